/* The transfer protocol of one group of W ranks over several calls. README.md says what is modelled and how to run.
 *
 * One call, for a source s and a destination d:
 *   s: puts a header or "empty" to d, and its rows in chunks                  -> begin_call
 *   d: one decider reads the header signal; workers wait for the chunk flags,
 *      read header and rows, put the results back in parts                    -> proctype serve
 *   s: all its results are in, it has served every source, its empty headers
 *      are quiet: the call is over, the next may start                        -> call_over
 * Nobody clears a signal and nobody waits at a barrier: every signal carries the epoch of its call.
 *
 * Every put is in flight on its own. Puts land in any order, and a put reads its payload from the sender's staging
 * when it lands, not when it is issued. A payload is modelled by the epoch of the call it belongs to.
 *
 * Steps: a d_step or atomic below is one load or store of one word that others can see, plus bookkeeping of its own
 * rank only; where it is more, its comment says why splitting it would add no behaviour.
 */

#ifndef W
#define W 2                     /* ranks: 2 or 3 */
#endif
#ifndef CALLS
#define CALLS 3                 /* calls per rank, at most 3; -DENDLESS: any number, see forget_oldest_epoch */
#endif
#ifndef CHUNKS
#define CHUNKS 2                /* row chunks per packet, 1 or 2, each with its own flag */
#endif
#ifndef PARTS
#define PARTS 2                 /* result parts (runs) per packet, 1 or 2, each with its own flag */
#endif
#ifndef RING
#define RING PARTS              /* result blocks of a rank, shared by all sources: part p is staged in p % RING */
#endif
#ifndef FANOUT
#define FANOUT (W - 1)          /* to how many destinations a rank may have rows in one call */
#endif
#ifndef ABORTS
#define ABORTS 0                /* how many ranks may time out, each at any moment of a call */
#endif

/* What rank a puts into rank b's memory. EMPTY and HEADER write the same signal word. */
#define EMPTY       0           /* "no rows for you in this epoch": a signal without payload, never answered */
#define HEADER      1           /* payload: counts and slot lists */
#define CHUNK(c)    (2 + (c))   /* payload: rows */
#define RESULT(p)   (2 + CHUNKS + (p))
#define KINDS       (2 + CHUNKS + PARTS)

#define PAIRS           (W * (W - 1))
#define PAIR(a, b)      ((a) * (W - 1) + (b) - ((b) > (a)))     /* of two different ranks */
#define WORD(a, b, k)   (PAIR(a, b) * KINDS + (k))
#define BIT(n)          (1 << (n))
#define ALL_PARTS       (BIT(PARTS) - 1)

/* Memory of b that a writes. Epoch 0 is older than every call. */
byte signal[PAIRS * KINDS];     /* epoch of the last put that signalled */
bit  header_rows[PAIRS];        /* the other half of the header's signal word: was it HEADER or EMPTY */
byte region[PAIRS * KINDS];     /* whose payload lies there: an epoch; for results a TAG */
bit  poison[W];                 /* somebody gave up */

/* Puts under way from a to b: one bit per epoch, so that one word's puts of two calls may overtake each other. */
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
byte block_readers[W * RING];   /* puts under way that read it; zero is what quiet tells */
byte empties[W];                /* EMPTY puts under way; likewise */
byte aborts_left = ABORTS;

/* What d knows of s in its current call: PAIR(d, s). */
#define UNDECIDED 0
#define NO_ROWS   1
#define ROWS      2
byte verdict[PAIRS];
byte ready[PAIRS];              /* mask of parts whose chunks were seen to be here */
byte sent[PAIRS];               /* mask of parts whose result put was issued */
#ifdef BREAK_ONE_DECIDER
byte verdict2[PAIRS];
#endif
#ifdef BREAK_REPLY_CONSUMED
byte consumed[PAIRS];           /* mask of parts that have been read */
#endif
#ifdef BREAK_FLAG_COUNTER       /* PAIR(d, s), memory of s: result parts that came from d since the first call */
byte count[PAIRS];
byte expected[PAIRS];
#endif

hidden byte i, j, k, e, sum;         /* scratch within one step, no part of the state */

#define TAG(e, s, p)    (((e) * W + (s)) * PARTS + (p))
#define NEXT_EPOCH      (W * PARTS)     /* distance of one epoch between tags */

#define under_way(a, b, kind)   (issued[WORD(a, b, kind)] | landed[WORD(a, b, kind)])
#define current(a, b, kind)     (signal[WORD(a, b, kind)] == epoch[b])

inline put(a, b, kind) {
#ifdef STRICT
  /* A consequence of the rules: no word is the target of two puts at once, so none can be overtaken. */
  assert(!under_way(a, b, kind) && (kind > HEADER || !(under_way(a, b, EMPTY) | under_way(a, b, HEADER))));
#endif
  issued[WORD(a, b, kind)] = issued[WORD(a, b, kind)] | BIT(epoch[a])
}


/* ---- the network: proctype network(a, b) carries a's puts to b ---------------------------------------------- */

inline payload_lands(kind) {
  if
  :: kind == EMPTY -> skip
  :: kind >= RESULT(0) -> region[WORD(a, b, kind)] = block[a * RING + (kind - RESULT(0)) % RING]
  :: else ->            /* packets are staged per destination: what the sender's latest call put there */
#ifdef BREAK_OWN_STAGING
     /* Rows are put straight from the caller's tensor, which is his own again when the call has ended. */
     region[WORD(a, b, kind)] = (phase[a] == RUNNING -> epoch[a] : 0)
#else
     region[WORD(a, b, kind)] = epoch[a]
#endif
  fi
}

inline signal_lands(kind) {
  if
  :: kind == EMPTY ->
     signal[WORD(a, b, HEADER)] = e; header_rows[PAIR(a, b)] = 0; empties[a]--
  :: kind == HEADER ->
     signal[WORD(a, b, HEADER)] = e; header_rows[PAIR(a, b)] = 1
  :: kind >= RESULT(0) ->
     signal[WORD(a, b, kind)] = e;
#ifdef BREAK_FLAG_COUNTER       /* SETs the number of parts up to this one */
     count[PAIR(a, b)] = expected[PAIR(a, b)] - PARTS + kind - RESULT(0) + 1;
#endif
#ifndef BREAK_PAYLOAD_FIRST
     block_readers[a * RING + (kind - RESULT(0)) % RING]--;
     if                         /* nobody will read the block before it is written: one state less to tell apart */
     :: !block_readers[a * RING + (kind - RESULT(0)) % RING] -> block[a * RING + (kind - RESULT(0)) % RING] = 0
     :: else
     fi
#endif
  :: else ->
     signal[WORD(a, b, kind)] = e
  fi
}

#ifdef BREAK_PAYLOAD_FIRST
#define FIRST_HALF(kind)  signal_lands(kind)
#define SECOND_HALF(kind) payload_lands(kind)
#else
#define FIRST_HALF(kind)  payload_lands(kind)
#define SECOND_HALF(kind) signal_lands(kind)
#endif

/* A put is two steps, its payload and then its signal: half a payload is no different to anybody from a payload
 * whose signal is missing. With -DMERGE it is one step: the payload still lands at any time after the put was issued,
 * but nothing comes between it and its signal. */
#define LAND(kind, any, pick) \
  :: d_step { any(issued[WORD(a, b, kind)]) -> \
       e = pick(issued[WORD(a, b, kind)]); \
       issued[WORD(a, b, kind)] = issued[WORD(a, b, kind)] ^ BIT(e); \
       landed[WORD(a, b, kind)] = landed[WORD(a, b, kind)] | BIT(e); \
       FIRST_HALF(kind) }
#define SIGNAL(kind, any, pick) \
  :: d_step { any(landed[WORD(a, b, kind)]) -> \
       e = pick(landed[WORD(a, b, kind)]); \
       landed[WORD(a, b, kind)] = landed[WORD(a, b, kind)] ^ BIT(e); \
       SECOND_HALF(kind) }
#define LAND_AND_SIGNAL(kind, any, pick) \
  :: d_step { any(issued[WORD(a, b, kind)]) -> \
       e = pick(issued[WORD(a, b, kind)]); \
       issued[WORD(a, b, kind)] = issued[WORD(a, b, kind)] ^ BIT(e); \
       FIRST_HALF(kind); SECOND_HALF(kind) }

/* Of several puts to one word the oldest or the newest goes next. STRICT asserts that there never are several. */
#define some(mask)      (mask)
#define several(mask)   (mask & (mask - 1))
#define oldest(mask)    (mask & BIT(1) -> 1 : (mask & BIT(2) -> 2 : 3))
#define newest(mask)    (mask & BIT(3) -> 3 : (mask & BIT(2) -> 2 : 1))
#ifdef STRICT
#define IN_ANY_ORDER(step, kind) step(kind, some, oldest)
#else
#define IN_ANY_ORDER(step, kind) step(kind, some, oldest) step(kind, several, newest)
#endif
#ifdef MERGE
#define DELIVER(kind)   IN_ANY_ORDER(LAND_AND_SIGNAL, kind)
#else
#define DELIVER(kind)   IN_ANY_ORDER(LAND, kind) IN_ANY_ORDER(SIGNAL, kind)
#endif

proctype network(byte a, b) {
end:
  do
  IN_ANY_ORDER(LAND_AND_SIGNAL, EMPTY)
  DELIVER(HEADER)
  DELIVER(CHUNK(0))
  DELIVER(RESULT(0))
#if CHUNKS > 1
  DELIVER(CHUNK(1))
#endif
#if PARTS > 1
  DELIVER(RESULT(1))
#endif
#if ABORTS > 0
  :: d_step { poison_issued[PAIR(a, b)] -> poison_issued[PAIR(a, b)] = 0; poison[b] = 1 }
#endif
  od
}


/* ---- the destination: proctype serve(d, s) is d's decider and workers for source s --------------------------- */

#ifdef BREAK_NEWER_EPOCH
#define decidable       current(s, d, HEADER)
#else
#define decidable       (signal[WORD(s, d, HEADER)] >= epoch[d])
#endif
#define header_says     (current(s, d, HEADER) && header_rows[PAIR(s, d)] -> ROWS : NO_ROWS)

#ifdef BREAK_EQUALITY
#define chunk_here(c)   (signal[WORD(s, d, CHUNK(c))] != 0)
#else
#define chunk_here(c)   current(s, d, CHUNK(c))
#endif
/* Part 0 needs only the first chunk, the last part needs all: an early expert starts while late rows travel, and
 * both read the rows that their experts share. */
#define LAST(p)         ((p) == PARTS - 1)
#define chunks_here(p)  (chunk_here(0) && (!LAST(p) || chunk_here(CHUNKS - 1)))

/* The last moment at which a part may still be reading. Checking only then loses nothing: a region never gets an
 * older payload back, so what was overwritten earlier is wrong now too. */
inline read_packet(p) {
  assert(region[WORD(s, d, HEADER)] == epoch[d]);
  assert(region[WORD(s, d, CHUNK(0))] == epoch[d]);
  assert(!LAST(p) || region[WORD(s, d, CHUNK(CHUNKS - 1))] == epoch[d])
}

#ifdef BREAK_STAGING
#define block_quiet(p)  true
#else
#define block_quiet(p)  (!block_readers[d * RING + (p) % RING])
#endif
#ifdef BREAK_FLAG_COUNTER       /* whoever counts parts sends them in counting order */
#define in_turn(p)      (sent[PAIR(d, s)] == BIT(p) - 1)
#else
#define in_turn(p)      true
#endif
#ifdef BREAK_REPLY_CONSUMED
#define READ_BEFORE_REPLY(p) skip
#else
#define READ_BEFORE_REPLY(p) read_packet(p)
#endif

#define working         (phase[d] == RUNNING && verdict[PAIR(d, s)] == ROWS)

/* Seeing the flags is one step. Reading, staging and issuing is another: reading earlier sees nothing more
 * (read_packet), issuing later is landing later. With -DMERGE a part sees the flags just before it reads. */
#ifdef MERGE
#define SEE_CHUNKS(p)
#define chunks_seen(p)  chunks_here(p)
#else
#define SEE_CHUNKS(p) \
  :: d_step { working && !(ready[PAIR(d, s)] & BIT(p)) && chunks_here(p) -> \
       ready[PAIR(d, s)] = ready[PAIR(d, s)] | BIT(p) }
#define chunks_seen(p)  (ready[PAIR(d, s)] & BIT(p))
#endif
#define SERVE_PART(p) \
  SEE_CHUNKS(p) \
  :: d_step { working && chunks_seen(p) && !(sent[PAIR(d, s)] & BIT(p)) && in_turn(p) && block_quiet(p) -> \
       READ_BEFORE_REPLY(p); \
       block[d * RING + (p) % RING] = TAG(epoch[d], s, p); \
       block_readers[d * RING + (p) % RING]++; \
       put(d, s, RESULT(p)); \
       sent[PAIR(d, s)] = sent[PAIR(d, s)] | BIT(p) }

proctype serve(byte d, s) {
end:
  do
  :: d_step { phase[d] == RUNNING && verdict[PAIR(d, s)] == UNDECIDED && decidable ->
       verdict[PAIR(d, s)] = header_says }      /* one load, one decider */
#ifdef BREAK_ONE_DECIDER
  :: d_step { phase[d] == RUNNING && verdict2[PAIR(d, s)] == UNDECIDED && decidable ->
       verdict2[PAIR(d, s)] = header_says }
#endif
  SERVE_PART(0)
#if PARTS > 1
  SERVE_PART(1)
#endif
#ifdef BREAK_REPLY_CONSUMED
  :: d_step { working && (sent[PAIR(d, s)] & ~consumed[PAIR(d, s)] & 1) ->
       read_packet(0); consumed[PAIR(d, s)] = consumed[PAIR(d, s)] | 1 }
#if PARTS > 1
  :: d_step { working && (sent[PAIR(d, s)] & ~consumed[PAIR(d, s)] & 2) ->
       read_packet(1); consumed[PAIR(d, s)] = consumed[PAIR(d, s)] | 2 }
#endif
#endif
  od
}


/* ---- the rank ------------------------------------------------------------------------------------------------- */

#if defined(BREAK_FLAG_COUNTER)
#define results_in(d)   (d == r || count[PAIR(d, r)] == expected[PAIR(d, r)])
#elif defined(BREAK_RESULT_EQUALITY)
#define results_in(d)   (d == r || !has_rows[PAIR(r, d)] || \
                         (signal[WORD(d, r, RESULT(0))] && signal[WORD(d, r, RESULT(PARTS - 1))]))
#else
#define results_in(d)   (d == r || !has_rows[PAIR(r, d)] || \
                         (current(d, r, RESULT(0)) && current(d, r, RESULT(PARTS - 1))))
#endif

#if defined(BREAK_SERVE)
#define served(s)       true
#elif defined(BREAK_REPLY_CONSUMED)
#define served(s)       (s == r || verdict[PAIR(r, s)] == NO_ROWS || consumed[PAIR(r, s)] == ALL_PARTS)
#elif defined(BREAK_ONE_DECIDER)
#define served(s)       (s == r || verdict2[PAIR(r, s)] && (verdict[PAIR(r, s)] == NO_ROWS || sent[PAIR(r, s)] == ALL_PARTS))
#else
#define served(s)       (s == r || verdict[PAIR(r, s)] == NO_ROWS || sent[PAIR(r, s)] == ALL_PARTS)
#endif

#ifdef BREAK_QUIET
#define empties_quiet   true
#else
#define empties_quiet   (!empties[r])
#endif

#define ALL_RANKS(property) (property(0) && property(1) && property(W - 1))     /* W is 2 or 3 */
#define call_over       (ALL_RANKS(results_in) && ALL_RANKS(served) && empties_quiet)

/* The combine reads the results, at the latest when the call ends. */
inline check_results() {
  for (j : 0 .. W - 1) {
    if
    :: j != r ->
       assert(!has_rows[PAIR(r, j)] || region[WORD(j, r, RESULT(0))] == TAG(epoch[r], r, 0));
       assert(!has_rows[PAIR(r, j)] || region[WORD(j, r, RESULT(PARTS - 1))] == TAG(epoch[r], r, PARTS - 1));
#ifdef BREAK_ONE_DECIDER        /* the two would lay out different canonical lists */
       assert(verdict[PAIR(r, j)] == verdict2[PAIR(r, j)])
#endif
    :: else
    fi
  }
}

/* After its last call nobody writes to a rank any more: its memory may go without a barrier. */
inline check_silence() {
#ifdef STRICT
  for (j : 0 .. W * KINDS - 1) {
    assert(j / KINDS == r || !under_way(j / KINDS, r, j % KINDS))
  }
#endif
  skip
}

/* With -DENDLESS: what lies in r's memory from before its current epoch is only ever compared with this epoch or a
 * later one, never equal, always less. It needs no name of its own and becomes 0. */
inline forget_earlier_calls() {
#ifdef ENDLESS
  for (i : 0 .. W * KINDS - 1) {
    if
    :: i / KINDS != r ->
       k = WORD(i / KINDS, r, i % KINDS);
       signal[k] = (signal[k] >= epoch[r] -> signal[k] : 0);
       if
       :: i % KINDS >= RESULT(0) -> region[k] = (region[k] >= TAG(epoch[r], 0, 0) -> region[k] : 0)
       :: i % KINDS == HEADER -> header_rows[PAIR(i / KINDS, r)] = (signal[k] -> header_rows[PAIR(i / KINDS, r)] : 0);
          region[k] = (region[k] >= epoch[r] -> region[k] : 0)
       :: else -> region[k] = (region[k] >= epoch[r] -> region[k] : 0)
       fi
    :: else
    fi
  };
#endif
  skip
}

/* With -DENDLESS the epochs of all ranks, and everything compared with them, move down by one when no rank is left
 * in the oldest epoch. All comparisons are with a rank's current epoch, so what is older than all of these needs no
 * name of its own: it becomes 0. The states are then finitely many for any number of calls. */
inline forget_oldest_epoch() {
#ifdef ENDLESS
  if
  :: epoch[0] > 1 && epoch[1] > 1 && epoch[W - 1] > 1 ->
     for (i : 0 .. W - 1) { epoch[i]-- }
     for (i : 0 .. PAIRS * KINDS - 1) {
       assert(!((issued[i] | landed[i]) & 3));          /* no put outlives the call after its own */
       issued[i] = issued[i] >> 1; landed[i] = landed[i] >> 1;
       signal[i] = (signal[i] -> signal[i] - 1 : 0);
       if
       :: i % KINDS >= RESULT(0) -> region[i] = (region[i] >= 2 * NEXT_EPOCH -> region[i] - NEXT_EPOCH : 0)
       :: else -> region[i] = (region[i] -> region[i] - 1 : 0)
       fi
     }
     for (i : 0 .. W * RING - 1) {
       block[i] = (block[i] >= 2 * NEXT_EPOCH -> block[i] - NEXT_EPOCH : 0)
     }
  :: else
  fi
#else
  skip
#endif
}

/* One step for all puts of a call: until a put lands nobody can tell whether it has been issued. */
inline begin_call() {
  epoch[r]++;
  sum = 0;
  for (j : 0 .. W - 1) {
    if
    :: j == r
    :: j != r ->
       has_rows[PAIR(r, j)] = 0;
       verdict[PAIR(r, j)] = UNDECIDED; ready[PAIR(r, j)] = 0; sent[PAIR(r, j)] = 0;
#ifdef BREAK_ONE_DECIDER
       verdict2[PAIR(r, j)] = UNDECIDED;
#endif
#ifdef BREAK_REPLY_CONSUMED
       consumed[PAIR(r, j)] = 0;
#endif
       if
       :: put(r, j, EMPTY); empties[r]++
       :: sum < FANOUT ->
          sum++; has_rows[PAIR(r, j)] = 1;
          put(r, j, HEADER);
          put(r, j, CHUNK(0));
#if CHUNKS > 1
          put(r, j, CHUNK(1));
#endif
#ifdef BREAK_FLAG_COUNTER
          expected[PAIR(j, r)] = expected[PAIR(j, r)] + PARTS
#endif
       fi
    fi
  }
  /* A rank waits for every other rank's header, so none gets two epochs ahead. */
#ifdef STRICT
  assert(epoch[r] <= epoch[0] + 1 && epoch[r] <= epoch[1] + 1 && epoch[r] <= epoch[W - 1] + 1);
#endif
  forget_earlier_calls();
  forget_oldest_epoch()
}

#ifdef ENDLESS
#define more_calls  true
#else
#define more_calls  (epoch[r] < CALLS)
#endif

#ifdef BREAK_TEARDOWN
#define puts_quiet  true
#else
#define puts_quiet  (!block_readers[r * RING] && !block_readers[r * RING + RING - 1])
#endif

inline poison_all() {
  for (j : 0 .. W - 1) {
    if
    :: j != r -> poison_issued[PAIR(r, j)] = 1
    :: else
    fi
  };
  skip
}

proctype rank(byte r) {
  do
  /* The end of a call and the start of the next are one step: to the others, a rank between two calls looks like one
   * whose next puts have not landed. Atomic, not d_step, because begin_call chooses. */
  :: atomic { phase[r] == RUNNING && call_over && more_calls -> check_results(); begin_call() }
  :: d_step { phase[r] == RUNNING && call_over && !more_calls -> check_results(); check_silence(); phase[r] = CLOSING }
  /* Results may still travel when the last call is over: the group's staging waits for them. */
  :: d_step { phase[r] == CLOSING && puts_quiet ->
       for (i : r * RING .. r * RING + RING - 1) { block[i] = 0 }
       phase[r] = CLOSED }
#if ABORTS > 0
  /* A deadline passes, whatever the rank was waiting for. */
  :: d_step { phase[r] == RUNNING && epoch[r] > 0 && aborts_left > 0 ->
       aborts_left--; phase[r] = FAILED;
       poison_all() }
  :: d_step { phase[r] == RUNNING && poison[r] -> phase[r] = FAILED }
#endif
#ifdef BREAK_STICKY
  :: atomic { phase[r] == FAILED && more_calls -> phase[r] = RUNNING; begin_call() }
#endif
  :: phase[r] == CLOSED || phase[r] == FAILED -> break
  od
}

init {
  atomic {
    for (i : 0 .. PAIRS - 1) { verdict[i] = NO_ROWS }   /* epoch 0: a call without rows that is over */
#ifdef BREAK_ONE_DECIDER
    for (i : 0 .. PAIRS - 1) { verdict2[i] = NO_ROWS }
#endif
    for (i : 0 .. W - 1) {
      run rank(i);
      for (j : 0 .. W - 1) {
        if
        :: i != j -> run network(i, j); run serve(i, j)
        :: else
        fi
      }
    }
  }
}
