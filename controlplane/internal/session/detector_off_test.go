//go:build !race

package session

// raceRounds of a hundred agents are the ten thousand races.
const raceRounds = 100
