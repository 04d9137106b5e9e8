// Package render turns answers of the API into text: tables and sentences for people, JSON and YAML for programs. It
// does no I/O and asks no clock; the time is an argument. Whatever it makes is safe on a terminal: text of the server's,
// and thus of any agent's, is stripped of control characters here (tables) or escaped (JSON, YAML).
package render
