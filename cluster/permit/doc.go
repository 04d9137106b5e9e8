// Package permit caps the calls toward each external issuer across the whole cluster, and says how it stays true while
// nodes die, clocks err and messages are lost.
//
// Who leads leases permits to nodes, for seconds at a time; a call in flight takes one. Two steps decide everything. They
// are pure, times are arguments, and a simulation runs thousands of clusters of them:
//
//	Holder (one a process and issuer)                         Granter (one a term of leadership)
//	  Arrive, Leave, End, Tick, Answer, Failed                  Ask, Committed, Sweep
//	  → calls that begin, a request, when to wake               → an answer, and what to commit before it is given
//
// Permits and Leader carry out what they decide. The rules, each with what it is for:
//
//   - A holder counts from when it asked, who leads from when that came: what one uses, the other still counts.
//   - A grant is committed before it is answered. So its leader led after the holder asked, and the next one, who waits a
//     whole lease from its own beginning, waits long enough: also when Raft was wiped and it knows of no leases.
//   - The log takes lease ids only upwards, and only those committed are used up. Who did not notice that another led in the
//     meantime fails at its first grant, and waits a whole lease like any other new leader.
//   - A replaced lease counts until it would have lapsed, because its holder may have calls under it or may not have heard.
//     It ends early only when its holder names it and says that nothing is in flight under it.
//   - A lease belongs to one start of a process. What a killed one had in flight counts beside what the next is granted.
//   - Tokens of a rate begin at 0 in each process, grow only under a lease, and never beyond one.
//
// What clocks may do is said in limits.go. Not covered: a process stopped between its check and its call, and the issuer's
// own delay in noticing that a call was given up.
package permit
