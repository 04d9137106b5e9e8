// Package onhost lists the connectors that agents link. The list is written out: what is not in it is not in the
// binary, and nothing is registered by being imported.
package onhost

import (
	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/connectors/target/file"
	"github.com/certmesh/certmesh/connectors/target/nginx"
)

// Targets returns the target kinds, sorted by name.
func Targets() []target.Kind {
	return []target.Kind{file.Kind(), nginx.Kind()}
}
