// Package migrations embeds the numbered SQL steps of the schema. PostgreSQL runs the cockroach folder unchanged.
package migrations

import "embed"

// FS holds cockroach/NNNN_name.sql and sqlite/NNNN_name.sql.
//
//go:embed cockroach/*.sql sqlite/*.sql
var FS embed.FS
