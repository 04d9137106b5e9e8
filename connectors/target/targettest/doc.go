// Package targettest is the conformance suite of connectors/target: what every connector must do, run against a real
// place to install to, and a real service where there is one.
//
// A connector's test calls Run with a Suite. What its Kind cannot do is named in Suite.Unsupported and tested to be
// refused properly; nothing is skipped in silence.
package targettest
