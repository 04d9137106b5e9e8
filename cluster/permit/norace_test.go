//go:build !race

package permit

// seeds is how many worlds TestNeverAboveTheCap tries.
const seeds = 2000
