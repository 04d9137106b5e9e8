// Package fresh proves that the committed protobuf code is what the pinned generators make of protocol/**/*.proto.
//
// It does in process what `make generate` does with buf, so that `make test` need not build buf (minutes, cold): the
// files are compiled by the library that buf itself compiles with, and handed to the generators that tools/go.mod pins.
package fresh
