// A small network between TAP devices: every frame follows the path of links from its source to its destination port.
// A link has a rate, a delay and a drop-tail buffer, and counts its bytes. Kernels without netem cannot delay otherwise,
// and groups with tapered links between them are one line of configuration each.
//
//   port <id> <tap>                      a TAP device, made here and moved into a host's namespace by bed.py
//   link <id> <bits/s> <delay ns> <buffer bytes, 0 = unlimited>
//   path <source> <destination> <link> [<link> [<link>]]
//
// usage: fabric CONFIG COUNTERS. SIGUSR1 writes "<dump number>", then "<link> <bytes> <frames> <drops> <longest queue>"
// per link to COUNTERS. MAC addresses are 02:00:00:00:<port, two bytes>; all neighbours are static.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { MAX_PORTS = 256, MAX_LINKS = 4096, MAX_HOPS = 3, FRAME = 9216, READS_PER_TURN = 32 };

typedef struct { double bytes_per_ns; int64_t delay, buffer, free_at; uint64_t bytes, frames, drops, longest; } Link;
typedef struct { int hops, link[MAX_HOPS]; } Path;
typedef struct Frame { int length, destination, hop; const Path *path; struct Frame *next; char data[FRAME]; } Frame;
typedef struct { int64_t time; uint64_t order; Frame *frame; } Event;

static Link links[MAX_LINKS];
static Path paths[MAX_PORTS][MAX_PORTS];
static int taps[MAX_PORTS], num_links, num_ports;
static Event *heap;  // by time, then by order of insertion
static int heap_size, heap_room;
static uint64_t inserted;
static Frame *spare;
static volatile sig_atomic_t stopping, dumping;

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int before(const Event *a, const Event *b) {
  return a->time != b->time ? a->time < b->time : a->order < b->order;
}

static void insert(int64_t time, Frame *frame) {
  if (heap_size == heap_room) heap = realloc(heap, (heap_room = heap_room ? 2 * heap_room : 1024) * sizeof *heap);
  Event event = {time, inserted++, frame};
  int at = heap_size++;
  for (int up; at && before(&event, &heap[up = (at - 1) / 2]); at = up) heap[at] = heap[up];
  heap[at] = event;
}

static Event take_first(void) {
  Event first = heap[0], last = heap[--heap_size];
  int at = 0;
  for (int child; (child = 2 * at + 1) < heap_size; at = child) {
    if (child + 1 < heap_size && before(&heap[child + 1], &heap[child])) child++;
    if (!before(&heap[child], &last)) break;
    heap[at] = heap[child];
  }
  heap[at] = last;
  return first;
}

static Frame *new_frame(void) {
  Frame *frame = spare;
  if (frame) spare = frame->next;
  return frame ? frame : malloc(sizeof *frame);
}

static void free_frame(Frame *frame) { frame->next = spare, spare = frame; }

static void enter_link(Frame *frame, int64_t time) {
  Link *link = &links[frame->path->link[frame->hop++]];
  int64_t start = link->free_at > time ? link->free_at : time;
  int64_t queued = (start - time) * link->bytes_per_ns;
  if (link->buffer && queued + frame->length > link->buffer) {
    link->drops++;
    free_frame(frame);
    return;
  }
  if ((uint64_t)queued + frame->length > link->longest) link->longest = queued + frame->length;
  link->free_at = start + (int64_t)(frame->length / link->bytes_per_ns);
  link->bytes += frame->length;
  link->frames++;
  insert(link->free_at + link->delay, frame);
}

static void read_port(int port) {
  for (int i = 0; i < READS_PER_TURN; i++) {
    Frame *frame = new_frame();
    frame->length = read(taps[port], frame->data, FRAME);
    const unsigned char *mac = (unsigned char *)frame->data;
    int to = frame->length > 14 && mac[0] == 2 && mac[1] == 0 ? mac[4] * 256 + mac[5] : -1;
    if (to < 0 || to >= num_ports || !paths[port][to].hops) {  // end of input, broadcast, or nowhere
      int ended = frame->length <= 0;
      free_frame(frame);
      if (ended) return;
      continue;
    }
    frame->destination = to, frame->hop = 0, frame->path = &paths[port][to];
    enter_link(frame, now());
  }
}

static void deliver_due(void) {
  for (int64_t t = now(); heap_size && heap[0].time <= t;) {
    Event event = take_first();
    Frame *frame = event.frame;
    if (frame->hop < frame->path->hops) {
      enter_link(frame, event.time);
    } else {
      if (write(taps[frame->destination], frame->data, frame->length) < 0 && errno != EIO) perror("write");
      free_frame(frame);
    }
  }
}

static void dump(const char *name) {
  static int number;
  char temporary[4096];
  snprintf(temporary, sizeof temporary, "%s.new", name);
  FILE *file = fopen(temporary, "w");
  if (!file) return;
  fprintf(file, "%d\n", ++number);
  for (int i = 0; i < num_links; i++)
    fprintf(file, "%d %llu %llu %llu %llu\n", i, (unsigned long long)links[i].bytes, (unsigned long long)links[i].frames,
            (unsigned long long)links[i].drops, (unsigned long long)links[i].longest);
  fclose(file);
  rename(temporary, name);
}

static int open_tap(const char *name) {
  struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
  memcpy(request.ifr_name, name, strnlen(name, IFNAMSIZ - 1));
  int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
  if (tap < 0 || ioctl(tap, TUNSETIFF, &request) < 0) {
    perror("/dev/net/tun");
    exit(2);
  }
  return tap;
}

static void configure(const char *name) {
  FILE *file = fopen(name, "r");
  char line[256], tap[IFNAMSIZ];
  if (!file) { perror(name); exit(2); }
  while (fgets(line, sizeof line, file)) {
    int id, to, hop[MAX_HOPS], fields;
    double rate;
    long long delay, buffer;
    if (sscanf(line, "port %d %15s", &id, tap) == 2) {
      taps[id] = open_tap(tap);
      if (id >= num_ports) num_ports = id + 1;
    } else if (sscanf(line, "link %d %lf %lld %lld", &id, &rate, &delay, &buffer) == 4) {
      links[id] = (Link){.bytes_per_ns = rate / 8e9, .delay = delay, .buffer = buffer};
      if (id >= num_links) num_links = id + 1;
    } else if ((fields = sscanf(line, "path %d %d %d %d %d", &id, &to, hop, hop + 1, hop + 2)) > 2) {
      paths[id][to].hops = fields - 2;
      memcpy(paths[id][to].link, hop, sizeof hop);
    }
  }
  fclose(file);
}

static void on_signal(int number) {
  if (number == SIGUSR1) dumping = 1;
  else stopping = 1;
}

int main(int argc, char **argv) {
  if (argc != 3) { fprintf(stderr, "usage: fabric CONFIG COUNTERS\n"); return 2; }
  configure(argv[1]);
  mlockall(MCL_CURRENT | MCL_FUTURE);
  signal(SIGUSR1, on_signal), signal(SIGTERM, on_signal), signal(SIGINT, on_signal);
  int poll = epoll_create1(0);
  for (int i = 0; i < num_ports; i++)
    epoll_ctl(poll, EPOLL_CTL_ADD, taps[i], &(struct epoll_event){.events = EPOLLIN, .data.u32 = i});
  printf("ready\n");
  fflush(stdout);
  while (!stopping) {
    if (dumping) dumping = 0, dump(argv[2]);
    deliver_due();
    int64_t pause = heap_size ? heap[0].time - now() : 1000000000LL;
    if (pause < 0) pause = 0;
    struct timespec limit = {pause / 1000000000LL, pause % 1000000000LL};
    struct epoll_event ready[64];
    int count = epoll_pwait2(poll, ready, 64, &limit, NULL);
    for (int i = 0; i < count; i++) read_port(ready[i].data.u32);
  }
  return 0;
}
