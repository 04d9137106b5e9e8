//go:build race

package session

// raceRounds leaves a run under the race detector, which takes three times as long, 5,000 races to find one.
const raceRounds = 50
