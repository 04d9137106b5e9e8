// Sqltext lists every SQL statement of the product and says which of them use what CockroachDB lacks or fakes.
//
//	go run ./e2e/sqltext [-root .] [-dump statements.jsonl]
//
// It prints one JSON object a line (see text). Sources are the migrations, the constant texts in the Go source of
// controlplane/internal/store and, with -dump, what the store's own suite executed: statements that are composed at
// run time exist nowhere else. A dump holds one JSON string a line; the suite writes it to the file that
// CERTMESH_SQL_DUMP names.
//
// Grammar is not support: CockroachDB's parser accepts, for example, advisory locks that lock nothing. The deny list
// here is checked by this package's tests, the grammar by the module e2e/sqlgrammar, which reads this program's output.
package main
