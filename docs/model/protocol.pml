/* The transfer protocol of one group of W ranks over several calls. README.md: what is modelled, how to run it.
 *
 * One call, for a source s and a destination d:
 *   s: puts a header or "empty" to d, and its rows in chunks                   begin_call
 *   d: one decider reads the header signal; workers wait for the chunk flags,
 *      read header and rows, put the results back in parts                     proctype serve
 *   d, in a backward call: reads all packets once more and releases them       proctype gradients
 *   s: its results are in, and its packets released; every source is served,
 *      its empties are quiet: the call is over, the next may start at once     call_over
 * Nobody clears a signal, nobody waits at a barrier: every signal carries the epoch of its call.
 *
 * Every put is under way on its own. Puts land in any order, and a put reads its payload from the sender's staging
 * when it lands, not when it is issued. A payload is modelled by the epoch of the call it belongs to.
 *
 * A d_step or atomic is one load or store that other ranks can see, with bookkeeping of its own rank around it. Where
 * it is more, its comment says why smaller steps would add no behaviour.
 */

#ifndef W
#define W 2                     /* ranks: 2 or 3 */
#endif
#ifndef CALLS
#define CALLS 3                 /* calls per rank, at most 3; -DENDLESS: any number, see forget_oldest_epoch */
#endif
#ifndef CHUNKS
#define CHUNKS 2                /* row chunks of a packet, 1 or 2, each with its own flag */
#endif
#ifndef PARTS
#define PARTS 2                 /* result parts (runs) of a packet, 1 or 2, each with its own flag */
#endif
#ifndef RING
#define RING PARTS              /* result blocks of a rank, shared by all its sources: part p is staged in p % RING */
#endif
#ifndef FANOUT
#define FANOUT (W - 1)          /* to how many destinations a rank may have rows in one call */
#endif
#ifndef BACKWARD
#define BACKWARD 0              /* 1: each call is forward or backward, for all ranks alike; 0: all are forward */
#endif
#ifndef ABORTS
#define ABORTS 0                /* how many times a rank may give up waiting, at any moment of a call */
#endif

/* What rank a puts into rank b's memory. EMPTY and HEADER write the same signal word. */
#define EMPTY       0           /* "no rows for you in this epoch": a signal without payload, never answered */
#define HEADER      1           /* payload: counts and slot lists */
#define RELEASE     2           /* "I have read your packet for the last time": a signal without payload; if BACKWARD */
#define CHUNK(c)    (2 + BACKWARD + (c))                        /* payload: rows */
#define RESULT(p)   (2 + BACKWARD + CHUNKS + (p))
#define KINDS       (2 + BACKWARD + CHUNKS + PARTS)

#define PAIRS           (W * (W - 1))
#define PAIR(a, b)      ((a) * (W - 1) + (b) - ((b) > (a)))     /* of two different ranks */
#define WORD(a, b, k)   (PAIR(a, b) * KINDS + (k))
#define BLOCK(a, p)     ((a) * RING + (p) % RING)
#define BIT(n)          (1 << (n))
#define ALL_PARTS       (BIT(PARTS) - 1)

/* Memory of b that a writes. Epoch 0 is older than every call. */
byte signal[PAIRS * KINDS];     /* epoch of the last put that signalled */
bit  header_rows[PAIRS];        /* the other half of the header's signal word: was it HEADER or EMPTY */
byte region[PAIRS * KINDS];     /* whose payload lies there: an epoch; for results a TAG */
bit  poison[W];                 /* somebody gave up */

/* Puts under way from a to b: one bit per epoch, so that one word's puts of several calls may overtake each other. */
byte issued[PAIRS * KINDS];     /* nothing has landed */
byte landed[PAIRS * KINDS];     /* the payload has, the signal has not */
bit  poison_issued[PAIRS];

/* Rank r. */
#define RUNNING 0
#define CLOSING 1               /* made its last call, still owns its result staging */
#define CLOSED  2
#define FAILED  3
byte phase[W];
byte epoch[W];
bit  has_rows[PAIRS];           /* PAIR(s, d): in its current call s has rows for d */
byte block[W * RING];           /* result staging: TAG of what lies there */
byte block_readers[W * RING];   /* puts under way that read it; quiet tells when there are none */
byte empties[W];                /* EMPTY puts under way; likewise */
#if BACKWARD
bit  backward[W];               /* its current call */
bit  released[W];               /* in its current call: the sources have been told, or it is forward */
#ifdef BREAK_RELEASE_CONSUMED
bit  last_read[W];              /* likewise: the gradients have been made */
#endif
#endif
byte aborts_left = ABORTS;

/* What d knows of s in its current call: PAIR(d, s). */
#define UNDECIDED 0
#define NO_ROWS   1
#define ROWS      2
byte verdict[PAIRS];
byte ready[PAIRS];              /* mask of parts whose chunks were seen to be here */
byte sent[PAIRS];               /* mask of parts whose result put was issued */
#ifdef BREAK_ONE_DECIDER
byte verdict2[PAIRS];           /* of a second reader of the header signal */
#endif
#ifdef BREAK_REPLY_CONSUMED
byte consumed[PAIRS];           /* mask of parts that have read the packet */
#endif
#ifdef BREAK_FLAG_COUNTER       /* PAIR(d, s), memory of s: result parts that came from d since the first call */
byte count[PAIRS];
byte expected[PAIRS];
#endif

/* Scratch within one step, no part of the state (breadth-first search cannot leave it out). */
#ifdef SHORTEST
byte i, j, k, e;
#else
hidden byte i, j, k, e;
#endif

/* A result of another call, another source's, or another part would have another tag. */
#define TAG(e, s, p)    (((e) * W + (s)) * PARTS + (p))
#define NEXT_EPOCH      (W * PARTS)             /* from one epoch's tag to the next */

#define under_way(a, b, kind)   (issued[WORD(a, b, kind)] | landed[WORD(a, b, kind)])
#define current(a, b, kind)     (signal[WORD(a, b, kind)] == epoch[b])

#define all_ranks(property)     (property(0) && property(1) && property(W - 1))         /* W is 2 or 3 */
#define some_rank(property)     (property(0) || property(1) || property(W - 1))

inline put(a, b, kind) {
#ifdef STRICT                   /* consequence of the rules: no word is the target of two puts at once */
  assert(!under_way(a, b, kind) && (kind > HEADER || !(under_way(a, b, EMPTY) | under_way(a, b, HEADER))));
#endif
  issued[WORD(a, b, kind)] = issued[WORD(a, b, kind)] | BIT(epoch[a])
}


/* ---- the network: proctype network(a, b) carries a's puts to b ---------------------------------------------- */

inline name(kind) {             /* for traces */
  if
  :: kind == EMPTY -> printf("put %d->%d of call %d, empty: ", a, b, e)
  :: kind == HEADER -> printf("put %d->%d of call %d, header: ", a, b, e)
#if BACKWARD
  :: kind == RELEASE -> printf("put %d->%d of call %d, release: ", a, b, e)
#endif
  :: kind >= RESULT(0) -> printf("put %d->%d of call %d, result part %d: ", a, b, e, kind - RESULT(0))
  :: else -> printf("put %d->%d of call %d, chunk %d: ", a, b, e, kind - CHUNK(0))
  fi
}

inline payload_lands(kind) {
  name(kind); printf("payload lands\n");
  if
  :: kind >= RESULT(0) ->
     region[WORD(a, b, kind)] = block[BLOCK(a, kind - RESULT(0))]
  :: else ->            /* packets are staged in memory that the sender's next call writes anew */
#ifdef BREAK_OWN_STAGING
     /* Rows are put straight from the caller's tensor, which is the caller's again when the call has ended. */
     region[WORD(a, b, kind)] = (phase[a] == RUNNING -> epoch[a] : 0)
#else
     region[WORD(a, b, kind)] = epoch[a]
#endif
  fi
}

inline signal_lands(kind) {
  name(kind); printf("signal lands\n");
  if
  :: kind == EMPTY ->
     signal[WORD(a, b, HEADER)] = e; header_rows[PAIR(a, b)] = 0
  :: kind == HEADER ->
     signal[WORD(a, b, HEADER)] = e; header_rows[PAIR(a, b)] = 1
  :: else ->
     signal[WORD(a, b, kind)] = e;
#ifdef BREAK_FLAG_COUNTER       /* SETs how many parts there are, counting this one */
     if
     :: kind >= RESULT(0) -> count[PAIR(a, b)] = expected[PAIR(a, b)] - PARTS + kind - RESULT(0) + 1
     :: else
     fi
#endif
  fi
}

inline put_is_done(kind) {
  if
  :: kind == EMPTY -> empties[a]--
  :: kind >= RESULT(0) ->
     block_readers[BLOCK(a, kind - RESULT(0))]--;
     if                         /* unread until it is written again: forgetting it saves states */
     :: !block_readers[BLOCK(a, kind - RESULT(0))] -> block[BLOCK(a, kind - RESULT(0))] = 0
     :: else
     fi
  :: else
  fi
}

#ifdef BREAK_PAYLOAD_FIRST
#define FIRST_HALF(kind)  signal_lands(kind)
#define SECOND_HALF(kind) payload_lands(kind)
#else
#define FIRST_HALF(kind)  payload_lands(kind)
#define SECOND_HALF(kind) signal_lands(kind)
#endif

/* Of several puts to one word the oldest or the newest goes next; STRICT asserts that there never are several.
 * FENCE: puts to the header's word keep their order instead of being quieted within the call. */
#define some(mask)      (mask)
#define several(mask)   (mask & (mask - 1))
#define oldest(mask)    (mask & BIT(1) -> 1 : (mask & BIT(2) -> 2 : 3))
#define newest(mask)    (mask & BIT(3) -> 3 : (mask & BIT(2) -> 2 : 1))
#if defined(STRICT) || defined(FENCE)
#define IN_ANY_ORDER(step, kind) step(kind, some, oldest)
#else
#define IN_ANY_ORDER(step, kind) step(kind, some, oldest) step(kind, several, newest)
#endif
#ifdef FENCE
#define may_land(kind)  (kind != HEADER || !issued[WORD(a, b, EMPTY)])
#else
#define may_land(kind)  true
#endif

/* A put is two steps, its payload and then its signal: half a payload is no different to anybody from a payload
 * whose signal is missing. With -DMERGE it is one step: the payload still lands at any time after the put was issued,
 * but nothing comes between it and its signal. */
#define TAKE(mask, pick) e = pick(mask); mask = mask ^ BIT(e)
#define LAND(kind, any, pick) \
  :: d_step { any(issued[WORD(a, b, kind)]) && may_land(kind) -> \
       TAKE(issued[WORD(a, b, kind)], pick); \
       landed[WORD(a, b, kind)] = landed[WORD(a, b, kind)] | BIT(e); \
       FIRST_HALF(kind) }
#define SIGNAL(kind, any, pick) \
  :: d_step { any(landed[WORD(a, b, kind)]) -> \
       TAKE(landed[WORD(a, b, kind)], pick); SECOND_HALF(kind); put_is_done(kind) }
#define LAND_AND_SIGNAL(kind, any, pick) \
  :: d_step { any(issued[WORD(a, b, kind)]) && may_land(kind) -> \
       TAKE(issued[WORD(a, b, kind)], pick); FIRST_HALF(kind); SECOND_HALF(kind); put_is_done(kind) }
#define SIGNAL_ALONE(kind, any, pick) \
  :: d_step { any(issued[WORD(a, b, kind)]) -> \
       TAKE(issued[WORD(a, b, kind)], pick); signal_lands(kind); put_is_done(kind) }

#ifdef MERGE
#define DELIVER(kind)   IN_ANY_ORDER(LAND_AND_SIGNAL, kind)
#else
#define DELIVER(kind)   IN_ANY_ORDER(LAND, kind) IN_ANY_ORDER(SIGNAL, kind)
#endif

proctype network(byte a, b) {
end:
  do
  IN_ANY_ORDER(SIGNAL_ALONE, EMPTY)
#if BACKWARD
  IN_ANY_ORDER(SIGNAL_ALONE, RELEASE)
#endif
  DELIVER(HEADER)
  DELIVER(CHUNK(0))
#if CHUNKS > 1
  DELIVER(CHUNK(1))
#endif
  DELIVER(RESULT(0))
#if PARTS > 1
  DELIVER(RESULT(1))
#endif
#if ABORTS > 0
  :: d_step { poison_issued[PAIR(a, b)] -> poison_issued[PAIR(a, b)] = 0; poison[b] = 1 }
#endif
  od
}


/* ---- the destination: proctype serve(d, s) is d's decider and d's workers for source s ----------------------- */

#ifdef BREAK_NEWER_EPOCH
#define decidable       current(s, d, HEADER)
#else
#define decidable       (signal[WORD(s, d, HEADER)] >= epoch[d])
#endif
#define header_says     (current(s, d, HEADER) && header_rows[PAIR(s, d)] -> ROWS : NO_ROWS)

#ifdef BREAK_EQUALITY
#define chunk_here(s, c) (signal[WORD(s, d, CHUNK(c))] != 0)
#else
#define chunk_here(s, c) current(s, d, CHUNK(c))
#endif
/* Part 0 needs only the first chunk, the last part needs all: an early expert starts while late rows travel, and
 * both read the rows that their experts share. */
#define LAST(p)         ((p) == PARTS - 1)
#define chunks_here(s, p) (chunk_here(s, 0) && (!LAST(p) || chunk_here(s, CHUNKS - 1)))

/* Called at the last moment at which a part may still be reading. Checking only then misses nothing: a payload lands
 * once, so what was overwritten while the part read it is wrong for good. */
inline read_packet(s, p) {
  printf("rank %d reads the packet of %d for part %d\n", d, s, p);
  assert(region[WORD(s, d, HEADER)] == epoch[d]);
  assert(region[WORD(s, d, CHUNK(0))] == epoch[d]);
  assert(!LAST(p) || region[WORD(s, d, CHUNK(CHUNKS - 1))] == epoch[d])
}

#ifdef BREAK_STAGING
#define block_quiet(p)  true
#else
#define block_quiet(p)  (!block_readers[BLOCK(d, p)])
#endif
#ifdef BREAK_FLAG_COUNTER       /* whoever counts parts sends them in counting order */
#define in_turn(p)      (sent[PAIR(d, s)] == BIT(p) - 1)
#else
#define in_turn(p)      true
#endif
#ifdef BREAK_REPLY_CONSUMED
#define READ_BEFORE_REPLY(p) skip
#define READ_AFTER_REPLY(p) \
  :: d_step { working && (sent[PAIR(d, s)] & BIT(p)) && !(consumed[PAIR(d, s)] & BIT(p)) -> \
       read_packet(s, p); consumed[PAIR(d, s)] = consumed[PAIR(d, s)] | BIT(p) }
#else
#define READ_BEFORE_REPLY(p) read_packet(s, p)
#define READ_AFTER_REPLY(p)
#endif

/* Reading, staging and issuing are one step: reading earlier sees nothing more (read_packet), and to issue later is
 * to land later. Seeing the flags is a step of its own; with -DMERGE it comes just before the reading. */
#ifdef MERGE
#define SEE_CHUNKS(p)
#define chunks_seen(s, p) chunks_here(s, p)
#else
#define SEE_CHUNKS(p) \
  :: d_step { working && !(ready[PAIR(d, s)] & BIT(p)) && chunks_here(s, p) -> \
       printf("rank %d sees the chunks of %d for part %d\n", d, s, p); \
       ready[PAIR(d, s)] = ready[PAIR(d, s)] | BIT(p) }
#define chunks_seen(s, p) (ready[PAIR(d, s)] & BIT(p))
#endif
#define REPLY(p) \
  :: d_step { working && chunks_seen(s, p) && !(sent[PAIR(d, s)] & BIT(p)) && in_turn(p) && block_quiet(p) -> \
       READ_BEFORE_REPLY(p); \
       printf("rank %d stages result part %d for %d and puts it\n", d, p, s); \
       block[BLOCK(d, p)] = TAG(epoch[d], s, p); block_readers[BLOCK(d, p)]++; \
       put(d, s, RESULT(p)); \
       sent[PAIR(d, s)] = sent[PAIR(d, s)] | BIT(p) }

#define working         (phase[d] == RUNNING && verdict[PAIR(d, s)] == ROWS)

proctype serve(byte d, s) {
end:
  do
  :: d_step { phase[d] == RUNNING && verdict[PAIR(d, s)] == UNDECIDED && decidable ->
       verdict[PAIR(d, s)] = header_says;       /* one load, once per epoch */
       printf("rank %d decides on %d in call %d: %d (1 no rows, 2 rows)\n", d, s, epoch[d], verdict[PAIR(d, s)]) }
#ifdef BREAK_ONE_DECIDER
  :: d_step { phase[d] == RUNNING && verdict2[PAIR(d, s)] == UNDECIDED && decidable ->
       verdict2[PAIR(d, s)] = header_says;
       printf("rank %d, second reader, decides on %d in call %d: %d\n", d, s, epoch[d], verdict2[PAIR(d, s)]) }
#endif
  SEE_CHUNKS(0)
  REPLY(0)
  READ_AFTER_REPLY(0)
#if PARTS > 1
  SEE_CHUNKS(1)
  REPLY(1)
  READ_AFTER_REPLY(1)
#endif
  od
}


/* ---- the destination of a backward call: its weight gradients, sums over the rows of all sources ------------- */

#if BACKWARD
#define all_decided     all_ranks(decided)
#define decided(s)      (s == d || verdict[PAIR(d, s)] != UNDECIDED)
/* What was made of a row on the way to its result goes into the sums, too. That its result was put is not asked for. */
#define all_rows_here   all_ranks(rows_here)
#define rows_here(s)    (s == d || verdict[PAIR(d, s)] == NO_ROWS || (chunks_seen(s, 0) && chunks_seen(s, PARTS - 1)))

inline read_packets() {
  printf("rank %d makes its weight gradients\n", d);
  for (j : 0 .. W - 1) {
    if
    :: j != d ->
       if
       :: verdict[PAIR(d, j)] == ROWS -> read_packet(j, 0); read_packet(j, PARTS - 1)
       :: else
       fi
    :: else
    fi
  };
  skip
}

#ifdef BREAK_RELEASE_NO_ROWS
#define owed_a_release(s) true
#else
#define owed_a_release(s) (verdict[PAIR(d, s)] == ROWS)
#endif
inline release_packets() {
  for (j : 0 .. W - 1) {
    if
    :: j != d ->
       if
       :: owed_a_release(j) -> printf("rank %d releases the packet of %d\n", d, j); put(d, j, RELEASE)
       :: else
       fi
    :: else
    fi
  };
  released[d] = 1
}

#define may_release     (phase[d] == RUNNING && !released[d] && all_decided)

/* The last read of all packets and the words that say so are one step, for the reasons given at REPLY. Each rank
 * chooses whether it wants weight gradients. One that wants none reads no packet again, and may tell at once: the
 * sources also wait for the replies. */
proctype gradients(byte d) {
end:
  do
#ifdef BREAK_RELEASE_CONSUMED
  :: d_step { may_release && all_rows_here -> release_packets() }
  :: d_step { phase[d] == RUNNING && released[d] && !last_read[d] -> read_packets(); last_read[d] = 1 }
#else
  :: d_step { may_release && all_rows_here -> read_packets(); release_packets() }
  :: d_step { may_release -> release_packets() }
#endif
  od
}
#endif


/* ---- the rank ------------------------------------------------------------------------------------------------- */

#if defined(BREAK_FLAG_COUNTER)
#define all_parts_in(d) (count[PAIR(d, r)] == expected[PAIR(d, r)])
#elif defined(BREAK_RESULT_EQUALITY)
#define all_parts_in(d) (signal[WORD(d, r, RESULT(0))] && signal[WORD(d, r, RESULT(PARTS - 1))])
#else
#define all_parts_in(d) (current(d, r, RESULT(0)) && current(d, r, RESULT(PARTS - 1)))
#endif
#define results_in(d)   (d == r || !has_rows[PAIR(r, d)] || all_parts_in(d))

#if BACKWARD
#if defined(BREAK_RELEASE)
#define release_in(d)   true
#elif defined(BREAK_RELEASE_EQUALITY)
#define release_in(d)   (d == r || !has_rows[PAIR(r, d)] || signal[WORD(d, r, RELEASE)])
#else
#define release_in(d)   (d == r || !has_rows[PAIR(r, d)] || current(d, r, RELEASE))
#endif
#ifdef BREAK_RELEASE_CONSUMED
#define gradients_made  (released[r] && last_read[r])
#else
#define gradients_made  released[r]
#endif
#define all_released    (!backward[r] || (gradients_made && all_ranks(release_in)))
#else
#define all_released    true
#endif

#if defined(BREAK_SERVE)
#define packet_served(s) true
#elif defined(BREAK_REPLY_CONSUMED)
#define packet_served(s) (consumed[PAIR(r, s)] == ALL_PARTS)
#elif defined(BREAK_ONE_DECIDER)
#define packet_served(s) (sent[PAIR(r, s)] == ALL_PARTS && verdict2[PAIR(r, s)])
#else
#define packet_served(s) (sent[PAIR(r, s)] == ALL_PARTS)
#endif
#define served(s)       (s == r || verdict[PAIR(r, s)] == NO_ROWS || packet_served(s))

#if defined(BREAK_QUIET) || defined(FENCE)
#define empties_quiet   true
#else
#define empties_quiet   (!empties[r])
#endif

#define call_over       (all_ranks(results_in) && all_released && all_ranks(served) && empties_quiet)

/* The combine reads the results, at the latest when the call ends. */
inline check_results() {
  if
  :: epoch[r] -> printf("rank %d ends call %d\n", r, epoch[r])
  :: else
  fi;
  for (j : 0 .. W - 1) {
    if
    :: j != r ->
       assert(!has_rows[PAIR(r, j)] || region[WORD(j, r, RESULT(0))] == TAG(epoch[r], r, 0));
       assert(!has_rows[PAIR(r, j)] || region[WORD(j, r, RESULT(PARTS - 1))] == TAG(epoch[r], r, PARTS - 1));
#ifdef BREAK_ONE_DECIDER        /* the two would lay out different canonical lists */
       assert(!verdict2[PAIR(r, j)] || verdict[PAIR(r, j)] == verdict2[PAIR(r, j)])
#endif
    :: else
    fi
  };
  skip
}

/* Consequence of the rules: when a rank's last call is over, no put to it is under way (poison apart). */
inline check_silence() {
#ifdef STRICT
  for (j : 0 .. W * KINDS - 1) {
    assert(j / KINDS == r || !under_way(j / KINDS, r, j % KINDS))
  };
#endif
  skip
}

/* With -DENDLESS: what lies in r's memory from before its current epoch will only ever be compared with this epoch or
 * later ones, and is less. It needs no name of its own and becomes 0. */
inline forget_earlier_calls() {
#ifdef ENDLESS
  for (i : 0 .. W * KINDS - 1) {
    if
    :: i / KINDS != r ->
       k = WORD(i / KINDS, r, i % KINDS);
       signal[k] = (signal[k] >= epoch[r] -> signal[k] : 0);
       region[k] = (region[k] >= (i % KINDS >= RESULT(0) -> TAG(epoch[r], 0, 0) : epoch[r]) -> region[k] : 0);
       header_rows[PAIR(i / KINDS, r)] = header_rows[PAIR(i / KINDS, r)] && signal[WORD(i / KINDS, r, HEADER)]
    :: else
    fi
  };
#endif
  skip
}

/* With -DENDLESS, when no rank is left in epoch 1, all epochs move down by one, with everything that is compared with
 * them. Only differences matter, so the finitely many states stand for any number of calls. */
inline forget_oldest_epoch() {
#ifdef ENDLESS
  if
  :: epoch[0] > 1 && epoch[1] > 1 && epoch[W - 1] > 1 ->
     for (i : 0 .. W - 1) { epoch[i]-- }
     for (i : 0 .. PAIRS * KINDS - 1) {
       assert(!((issued[i] | landed[i]) & (BIT(0) | BIT(1))));     /* no put outlives the call after its own */
       issued[i] = issued[i] >> 1; landed[i] = landed[i] >> 1;
       signal[i] = (signal[i] -> signal[i] - 1 : 0);
       k = (i % KINDS >= RESULT(0) -> NEXT_EPOCH : 1);
       region[i] = (region[i] >= 2 * k -> region[i] - k : 0)
     }
     for (i : 0 .. W * RING - 1) { block[i] = (block[i] >= 2 * NEXT_EPOCH -> block[i] - NEXT_EPOCH : 0) }
  :: else
  fi;
#endif
  skip
}

/* All ranks make the same call: the first to begin it chooses of which kind it is. */
inline choose_kind() {
#if BACKWARD
#define in_this_call(p) (p != r && epoch[p] == epoch[r])
#define backward_in_this_call(p) (in_this_call(p) && backward[p])
  if
  :: some_rank(in_this_call) -> backward[r] = some_rank(backward_in_this_call)
  :: !some_rank(in_this_call) -> printf("rank %d makes call %d a forward call\n", r, epoch[r]); backward[r] = 0
  :: !some_rank(in_this_call) -> printf("rank %d makes call %d a backward call\n", r, epoch[r]); backward[r] = 1
  fi;
  released[r] = !backward[r];
#ifdef BREAK_RELEASE_CONSUMED
  last_read[r] = !backward[r];
#endif
#endif
  skip
}

/* One step for all puts of a call: until a put lands nobody can tell whether it has been issued. */
inline begin_call() {
  epoch[r]++;
  choose_kind();
  k = 0;
  for (j : 0 .. W - 1) {
    if
    :: j == r
    :: j != r ->
       has_rows[PAIR(r, j)] = 0; verdict[PAIR(r, j)] = UNDECIDED; ready[PAIR(r, j)] = 0; sent[PAIR(r, j)] = 0;
#ifdef BREAK_ONE_DECIDER
       verdict2[PAIR(r, j)] = UNDECIDED;
#endif
#ifdef BREAK_REPLY_CONSUMED
       consumed[PAIR(r, j)] = 0;
#endif
       if
       :: printf("rank %d begins call %d: no rows for %d\n", r, epoch[r], j);
          put(r, j, EMPTY); empties[r]++
       :: k < FANOUT ->
          printf("rank %d begins call %d: rows for %d\n", r, epoch[r], j);
          k++; has_rows[PAIR(r, j)] = 1;
          put(r, j, HEADER); put(r, j, CHUNK(0));
#if CHUNKS > 1
          put(r, j, CHUNK(1));
#endif
#ifdef BREAK_FLAG_COUNTER
          expected[PAIR(j, r)] = expected[PAIR(j, r)] + PARTS
#endif
       fi
    fi
  };
#ifdef STRICT                   /* consequence of the rules: every rank waits for all headers, none gets two ahead */
  assert(epoch[r] <= epoch[0] + 1 && epoch[r] <= epoch[1] + 1 && epoch[r] <= epoch[W - 1] + 1);
#endif
  forget_earlier_calls();
  forget_oldest_epoch()
}

#ifdef ENDLESS
#define more_calls      true
#else
#define more_calls      (epoch[r] < CALLS)
#endif
#ifdef BREAK_TEARDOWN
#define results_quiet   true
#else
#define results_quiet   (!block_readers[BLOCK(r, 0)] && !block_readers[BLOCK(r, RING - 1)])
#endif

/* Ranks differ in nothing but their number: if one gives up at most, it may as well be rank 0. */
#define may_time_out    (phase[r] == RUNNING && epoch[r] > 0 && aborts_left > 0 && (ABORTS > 1 || r == 0))

inline poison_all() {
  for (j : 0 .. W - 1) {
    if
    :: j != r -> poison_issued[PAIR(r, j)] = 1
    :: else
    fi
  };
  skip
}

/* The end of a call and the start of the next are one step: to the others, a rank between two calls looks like one
 * whose next puts have not landed. Atomic, not d_step, because begin_call chooses; it never blocks. */
proctype rank(byte r) {
  do
  :: atomic { phase[r] == RUNNING && call_over && more_calls -> check_results(); begin_call() }
  :: d_step { phase[r] == RUNNING && call_over && !more_calls -> check_results(); check_silence(); phase[r] = CLOSING }
  :: d_step { phase[r] == CLOSING && results_quiet ->           /* results may outlive the call; staging is freed now */
       printf("rank %d frees its staging\n", r);
       for (i : r * RING .. r * RING + RING - 1) { block[i] = 0 }; phase[r] = CLOSED }
#if ABORTS > 0
  :: d_step { may_time_out ->                                   /* whatever it was waiting for */
       printf("rank %d times out in call %d\n", r, epoch[r]);
       aborts_left--; phase[r] = FAILED; poison_all() }
  :: d_step { phase[r] == RUNNING && poison[r] ->
       printf("rank %d sees poison in call %d\n", r, epoch[r]); phase[r] = FAILED }
#endif
#ifdef BREAK_STICKY
  :: atomic { phase[r] == FAILED && more_calls -> phase[r] = RUNNING; begin_call() }
#endif
  :: phase[r] == CLOSED || phase[r] == FAILED -> break
  od
}

init {
  atomic {
    for (i : 0 .. PAIRS - 1) { verdict[i] = NO_ROWS }   /* epoch 0: a call without rows, which is over */
    for (i : 0 .. W - 1) {
      run rank(i);
#if BACKWARD
      released[i] = 1;
      run gradients(i);
#endif
      for (j : 0 .. W - 1) {
        if
        :: i != j -> run network(i, j); run serve(i, j)
        :: else
        fi
      }
    }
  }
}
