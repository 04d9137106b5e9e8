// Package sqlgrammar parses every SQL statement of the product with CockroachDB's own grammar.
//
// It is a module of its own, because the parser brings some 450 packages. The statements come from e2e/sqltext; the ones
// that the store composes at run time are seen only when CERTMESH_SQL_DUMP names a file that the store's suite has
// written (`make test` does this). Grammar is not support: see the deny list in e2e/sqltext.
package sqlgrammar
