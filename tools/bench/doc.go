// Bench measures what certmesh promises about speed.
//
//	bench run -root DIR [-only regexp] [-full]      every suite, once; the figures go into docs/benchmarks.md
//	bench compare -root DIR -base REVISION [-minute] [-factor 3]
//
// run prints what the benchmarks print and replaces the part of docs/benchmarks.md between its two marks: the machine, each
// figure with what was promised, and the physical limit that the same run measured beside it. So that it fits into ten
// minutes, the largest suites are smaller than what was promised, and the page says how small; with -full, or
// CERTMESH_BENCH_FULL=1, it measures a million certificates, ten thousand streams and so on.
//
// compare builds two revisions, the working tree and the base, and runs the same benchmarks of both in turns, so that what
// else happens on the machine meets both; benchstat prints the ratios. It fails only when the median of a figure is worse by
// more than the factor, which is meant to be beyond what noise explains. With -minute it runs the short suites alone.
package main
