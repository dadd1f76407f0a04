/* Runs a program of exchange/host/program.py: the loop of loop.py in C. Compiled at first use by native.py.
 *
 * One rank, one thread. What is ready is started, what has come is taken, and when nothing moves the rank sleeps in one
 * place: epoll over its sockets and its bell, a pipe that local ranks write to when they leave a message in shared
 * memory and see that it sleeps. `exchange_progress` returns to Python now and then, so that Ctrl-C and timeouts work.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COPY, MEMORY, SOCKET };
enum { DONE = 0, MOVED = 1, IDLE = 2 }; /* of exchange_progress; errors are negative */
enum { PIECES = 64, EVENTS = 64, TURNS = 4096, READS = 16, LINE = 16, NOBODY = -1 };
enum { DRY = 0, READABLE = 1, ENDED = 2 }; /* of a connection: after its end every read tells of it */

typedef struct { int64_t buffer, offset, length; } Range;
typedef struct { int64_t way, peer, first, last, to_first, to_last, slot, waits; } Send; /* ranges first..last - 1 */
typedef struct { int64_t way, peer, first, last, slot; } Receive;

/* Messages are numbered: receives 0..R-1, then sends R..R+S-1. */
typedef struct {
    int64_t sends, receives;
    const Send *send;
    const Receive *receive;
    const Range *range;
    const int64_t *first_follower, *follower; /* sends that wait for a message */
} Program;

typedef struct { int64_t message, range, done; } Cursor; /* done: bytes of the range at hand */

typedef struct {
    int ranks, index, size, epoll; /* index of size: this rank on its node */
    uint32_t *words;               /* counters in shared memory: see shared_memory.py */
    uint32_t *sent, *taken, *free_at[2];
    int *bell, *connection;
    char *readable;

    Program program;
    uint8_t *buffer[3], *const *region; /* region: what each local rank writes in this exchange */
    int turn, region_is_free;
    int64_t unfinished, capacity;
    int64_t *waits, *ready, *next, num_ready; /* next: receive from the same peer */
    int64_t *memory_head;
    Cursor *in, *out; /* by peer */
    int failed_peer, failed_sending;
} Links;

static uint32_t *sent_word(Links *l, int from, int to) { return l->words + (from * l->size + to) * LINE; }
static uint32_t *taken_word(Links *l, int from, int to) { return sent_word(l, l->size + from, to); }
static uint32_t *sleeps_word(Links *l, int who) { return l->words + (2 * l->size * l->size + who) * LINE; }

Links *exchange_open(int ranks, int index, int size, uint32_t *words, const int *bells) {
    Links *l = calloc(1, sizeof *l);
    l->ranks = ranks, l->index = index, l->size = size, l->words = words;
    l->epoll = epoll_create1(EPOLL_CLOEXEC);
    l->sent = calloc(size, sizeof *l->sent), l->taken = calloc(size, sizeof *l->taken);
    for (int h = 0; h < 2; h++) l->free_at[h] = calloc(size, sizeof **l->free_at);
    l->bell = calloc(size, sizeof *l->bell), l->memory_head = calloc(size, sizeof *l->memory_head);
    l->connection = malloc(ranks * sizeof *l->connection), l->readable = calloc(ranks, 1);
    l->in = calloc(ranks, sizeof *l->in), l->out = calloc(ranks, sizeof *l->out);
    for (int p = 0; p < ranks; p++) l->connection[p] = NOBODY;
    if (words) {
        memcpy(l->bell, bells, size * sizeof *bells);
        struct epoll_event bell = {.events = EPOLLIN, .data.u32 = ranks};
        epoll_ctl(l->epoll, EPOLL_CTL_ADD, l->bell[index], &bell);
    }
    return l;
}

int exchange_connect(Links *l, int peer, int descriptor) {
    struct epoll_event both = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.u32 = peer};
    l->connection[peer] = descriptor, l->readable[peer] = READABLE;
    return epoll_ctl(l->epoll, EPOLL_CTL_ADD, descriptor, &both) ? -errno : 0;
}

void exchange_close(Links *l) {
    close(l->epoll);
    void *owned[] = {l->sent, l->taken, l->free_at[0], l->free_at[1], l->bell, l->memory_head, l->connection,
                     l->readable, l->in, l->out, l->waits, l->ready, l->next, l};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
}

static void begin(Links *l, const Program *program) {
    Program *p = &l->program;
    *p = *program;
    int64_t messages = p->sends + p->receives;
    if (messages > l->capacity) {
        l->capacity = messages;
        l->waits = realloc(l->waits, messages * sizeof *l->waits);
        l->ready = realloc(l->ready, messages * sizeof *l->ready);
        l->next = realloc(l->next, messages * sizeof *l->next);
    }
    l->unfinished = messages, l->num_ready = 0;
    for (int64_t s = 0; s < p->sends; s++)
        if (!(l->waits[s] = p->send[s].waits)) l->ready[l->num_ready++] = s;
    for (int r = 0; r < l->size; r++) l->memory_head[r] = NOBODY;
    for (int r = 0; r < l->ranks; r++) l->in[r].message = l->out[r].message = NOBODY;
    for (int64_t r = p->receives - 1; r >= 0; r--) {
        const Receive *receive = &p->receive[r];
        int64_t *head = receive->way == MEMORY ? &l->memory_head[receive->peer] : &l->in[receive->peer].message;
        l->next[r] = *head, *head = r;
        if (receive->way == SOCKET) l->in[receive->peer].range = receive->first, l->in[receive->peer].done = 0;
    }
}

static uint8_t *place(Links *l, const Range *range) { return l->buffer[range->buffer] + range->offset; }

static void finish(Links *l, int64_t message) {
    const Program *p = &l->program;
    l->unfinished--;
    for (int64_t f = p->first_follower[message]; f < p->first_follower[message + 1]; f++)
        if (!--l->waits[p->follower[f]]) l->ready[l->num_ready++] = p->follower[f];
}

static void copy_inside(Links *l, const Send *send) {
    const Range *to = l->program.range + send->to_first;
    int64_t written = 0;
    for (int64_t r = send->first; r < send->last; r++) {
        const Range *from = l->program.range + r;
        for (int64_t read = 0, n; read < from->length; read += n, written += n) {
            if (written == to->length) to++, written = 0;
            n = from->length - read < to->length - written ? from->length - read : to->length - written;
            memcpy(place(l, to) + written, place(l, from) + read, n);
        }
    }
}

static void ring(Links *l, int peer) {
    if (__atomic_load_n(sleeps_word(l, peer), __ATOMIC_SEQ_CST) && write(l->bell[peer], "!", 1) < 0) { /* full: it rings */ }
}

static void send_by_memory(Links *l, const Send *send) {
    uint8_t *slot = l->region[l->index] + send->slot;
    for (int64_t r = send->first; r < send->last; r++) {
        const Range *from = l->program.range + r;
        memcpy(slot, place(l, from), from->length);
        slot += from->length;
    }
    __atomic_store_n(sent_word(l, l->index, send->peer), ++l->sent[send->peer], __ATOMIC_SEQ_CST);
    ring(l, send->peer);
}

/* The next pieces of a message from the cursor on. */
static int pieces(Links *l, const Cursor *at, int64_t last, struct iovec *piece) {
    int count = 0;
    int64_t done = at->done;
    for (int64_t r = at->range; r < last && count < PIECES; r++, done = 0) {
        const Range *range = l->program.range + r;
        piece[count++] = (struct iovec){place(l, range) + done, range->length - done};
    }
    return count;
}

static void advance(Links *l, Cursor *at, int64_t moved) {
    for (at->done += moved; at->done && at->done >= l->program.range[at->range].length; at->range++)
        at->done -= l->program.range[at->range].length;
}

/* Whether something moved, or an error. */
static int write_to(Links *l, int peer) {
    Cursor *at = &l->out[peer];
    const Send *send = &l->program.send[at->message];
    struct iovec piece[PIECES];
    for (int moved = 0;; moved = 1) {
        struct msghdr message = {.msg_iov = piece, .msg_iovlen = pieces(l, at, send->last, piece)};
        ssize_t count = sendmsg(l->connection[peer], &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count < 0 && (errno == EAGAIN || errno == EINTR)) return moved;
        if (count < 0) return l->failed_peer = peer, l->failed_sending = 1, -errno;
        advance(l, at, count);
        if (at->range == send->last) {
            int64_t done = l->program.receives + at->message;
            at->message = NOBODY;
            return finish(l, done), 1;
        }
    }
}

/* At most READS times, so that one fast peer does not hold up the others. */
static int read_from(Links *l, int peer) {
    Cursor *at = &l->in[peer];
    struct iovec piece[PIECES];
    int moved = 0;
    for (int turn = 0; turn < READS && at->message != NOBODY && l->readable[peer]; turn++) {
        const Receive *receive = &l->program.receive[at->message];
        struct msghdr message = {.msg_iov = piece, .msg_iovlen = pieces(l, at, receive->last, piece)};
        ssize_t count = recvmsg(l->connection[peer], &message, MSG_DONTWAIT);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0 && errno == EAGAIN) return l->readable[peer] = DRY, moved;
        if (count <= 0) return l->failed_peer = peer, l->failed_sending = 0, count ? -errno : -ECONNRESET;
        advance(l, at, count), moved = 1;
        if (at->range != receive->last) {
            if (message.msg_iovlen < PIECES && l->readable[peer] == READABLE) l->readable[peer] = DRY; /* a short read */
        } else {
            int64_t done = at->message;
            at->message = l->next[done], at->done = 0;
            if (at->message != NOBODY) at->range = l->program.receive[at->message].first;
            finish(l, done);
        }
    }
    return moved;
}

static int take_from_memory(Links *l) {
    int moved = 0;
    for (int peer = 0; peer < l->size; peer++)
        for (int64_t r; (r = l->memory_head[peer]) != NOBODY; moved = 1) {
            if (__atomic_load_n(sent_word(l, peer, l->index), __ATOMIC_SEQ_CST) == l->taken[peer]) break;
            const Receive *receive = &l->program.receive[r];
            const uint8_t *slot = l->region[peer] + receive->slot;
            for (int64_t i = receive->first; i < receive->last; i++) {
                const Range *to = l->program.range + i;
                memcpy(place(l, to), slot, to->length);
                slot += to->length;
            }
            __atomic_store_n(taken_word(l, peer, l->index), ++l->taken[peer], __ATOMIC_RELEASE);
            l->memory_head[peer] = l->next[r];
            finish(l, r);
        }
    return moved;
}

static int memory_is_free(Links *l) {
    for (int peer = 0; peer < l->size && !l->region_is_free; peer++) {
        uint32_t taken = __atomic_load_n(taken_word(l, l->index, peer), __ATOMIC_ACQUIRE);
        if (peer != l->index && (int32_t)(taken - l->free_at[l->turn][peer]) < 0) return 0;
    }
    return l->region_is_free = 1;
}

/* Starts what is ready; what must wait for shared memory stays ready. */
static int start_ready(Links *l) {
    int64_t kept = 0, moved = 0;
    for (int64_t i = 0; i < l->num_ready; i++) { /* which grows meanwhile */
        int64_t s = l->ready[i];
        const Send *send = &l->program.send[s];
        if (send->way == MEMORY && !memory_is_free(l)) {
            l->ready[kept++] = s;
            continue;
        }
        moved = 1;
        if (send->way == SOCKET) {
            l->out[send->peer] = (Cursor){s, send->first, 0};
            int status = write_to(l, send->peer);
            if (status < 0) return status;
            continue;
        }
        if (send->way == COPY) copy_inside(l, send);
        else send_by_memory(l, send);
        finish(l, l->program.receives + s);
    }
    l->num_ready = kept;
    return moved;
}

static int handle(Links *l, const struct epoll_event *event) {
    char silenced[64];
    int peer = event->data.u32;
    if (peer == l->ranks) return read(l->bell[l->index], silenced, sizeof silenced) > 0;
    l->readable[peer] = event->events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR) ? ENDED : READABLE;
    return l->out[peer].message == NOBODY ? 0 : write_to(l, peer);
}

/* Goes on for at most about `milliseconds` in which nothing moves. */
int exchange_progress(Links *l, int milliseconds) {
    struct epoll_event event[EVENTS];
    for (int turn = 0, slept = 0, status; turn < TURNS; turn++) {
        if ((status = start_ready(l)) < 0) return status;
        int moved = status | take_from_memory(l);
        for (int peer = 0; peer < l->ranks; peer++) {
            if ((status = read_from(l, peer)) < 0) return status;
            moved |= status;
        }
        if (!l->unfinished) {
            memcpy(l->free_at[l->turn], l->sent, l->size * sizeof *l->sent);
            return DONE;
        }
        if (moved) continue;
        int sleeps = l->words != NULL;
        if (sleeps) {
            __atomic_store_n(sleeps_word(l, l->index), 1, __ATOMIC_SEQ_CST);
            moved = take_from_memory(l); /* what came before the bell could know */
        }
        int waiting = l->num_ready ? 1 : milliseconds; /* no bell rings when memory becomes free */
        int count = moved ? 0 : epoll_wait(l->epoll, event, EVENTS, waiting);
        if (sleeps) __atomic_store_n(sleeps_word(l, l->index), 0, __ATOMIC_SEQ_CST);
        if (moved) continue;
        if (count < 0) return errno == EINTR ? MOVED : -errno;
        slept = count ? 0 : slept + waiting;
        for (int i = 0; i < count; i++)
            if ((status = handle(l, &event[i])) < 0) return status;
        if (slept >= milliseconds) return IDLE;
    }
    return MOVED;
}

/* Starts a program on input, output and staging and the halves `turn` of the regions, and goes on as above. */
int exchange_run(Links *l, const Program *program, uint8_t *input, uint8_t *output, uint8_t *staging,
                 uint8_t *const *region, int turn, int milliseconds) {
    l->buffer[0] = input, l->buffer[1] = output, l->buffer[2] = staging;
    l->region = region, l->turn = turn, l->region_is_free = 0;
    begin(l, program);
    return exchange_progress(l, milliseconds);
}

/* The number of a receive that has not arrived, or NOBODY. */
int64_t exchange_pending(const Links *l) {
    int64_t first = l->program.receives;
    for (int r = 0; r < l->size; r++)
        if (l->memory_head[r] != NOBODY && l->memory_head[r] < first) first = l->memory_head[r];
    for (int r = 0; r < l->ranks; r++)
        if (l->in[r].message != NOBODY && l->in[r].message < first) first = l->in[r].message;
    return first < l->program.receives ? first : NOBODY;
}

/* The rank whose connection failed, and in which direction. */
int exchange_failed_peer(const Links *l, int *sending) {
    *sending = l->failed_sending;
    return l->failed_peer;
}
