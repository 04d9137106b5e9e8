// Package permits proves, with real processes, that one cap toward an issuer holds for the whole cluster: nodes with Raft
// over TLS, links between them and leases of permits call a stand-in for a CA that counts what reaches it and at times
// wants to be left alone, while nodes are killed and started again.
//
// What the CA sees is judged: never more calls in flight than allowed, none begun faster, none by a node that was told to
// wait, and calls by every node, also after the leader was killed. A process that is stopped between its check and its call
// can exceed the cap; nobody can prevent that, and nothing here does it.
//
// CERTMESH_PERMITS_SECONDS makes it last longer, CERTMESH_PERMITS_NODES asks for another number of nodes.
package permits
