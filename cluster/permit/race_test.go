//go:build race

package permit

// seeds are fewer where each costs ten times as much.
const seeds = 300
