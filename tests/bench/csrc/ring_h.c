/*
 * What a driver in C does with Xen's own ring.h and netif.h: requests on a shared ring, responses back, and, unless only
 * descriptors are measured, bytes written to a page and copied out of it. It checks nothing of what it reads, except what
 * Xen checks where the copies are Xen's.
 */
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* The newest interface: ring.h then leaves the barriers to its user. */
#define __XEN_INTERFACE_VERSION__ __XEN_LATEST_INTERFACE_VERSION__

#define xen_mb() atomic_thread_fence(memory_order_seq_cst)
#define xen_rmb() atomic_thread_fence(memory_order_acquire)
#define xen_wmb() atomic_thread_fence(memory_order_release)

#include <xen/xen.h>
#include <xen/io/netif.h>

#define IDS 256
#define PAGE 4096
#define MOST 64

/* What Rust gives and both ends read. */
struct work {
    uint32_t size;      /* bytes of a packet; 0: descriptors alone */
    uint32_t written;   /* of which the producer writes so many */
    uint32_t batch;     /* packets shown at a time */
    uint32_t spread;    /* bytes between the places where packets begin in their pages */
    uint8_t *ring;      /* a page */
    uint8_t **pages;    /* IDS of them, the producer's */
    uint8_t *buffers;   /* for IDS packets, the consumer's */
    const uint8_t *payload;
    /* Where there are any, the bytes are copied by Xen: by reference, to frames. */
    const uint32_t *refs;
    const uint64_t *frames;
    domid_t domain;
    void *xen;
    int (*copy)(void *xen, struct gnttab_copy *ops, uint32_t count);
};

struct front {
    netif_tx_front_ring_t ring;
    uint16_t free[IDS];
    uint32_t count;
};

struct back {
    netif_tx_back_ring_t ring;
    uint64_t done;
    uint32_t next;
    struct gnttab_copy ops[MOST];
};

size_t ring_h_front_size(void) { return sizeof(struct front); }
size_t ring_h_back_size(void) { return sizeof(struct back); }

void ring_h_init(const struct work *work, struct front *front, struct back *back)
{
    netif_tx_sring_t *shared = (netif_tx_sring_t *)work->ring;

    SHARED_RING_INIT(shared);
    FRONT_RING_INIT(&front->ring, shared, PAGE);
    BACK_RING_INIT(&back->ring, shared, PAGE);
    for (front->count = 0; front->count < IDS; front->count++)
        front->free[front->count] = IDS - 1 - front->count;
    back->done = back->next = 0;
}

static inline void front_turn(const struct work *work, struct front *front)
{
    const uint32_t slots = work->size ? (work->size + PAGE - 1) / PAGE : 1;
    uint32_t batch = work->batch * slots > IDS ? IDS / slots : work->batch;
    int notify;

    RING_IDX prod = front->ring.sring->rsp_prod;

    xen_rmb();
    while (front->ring.rsp_cons != prod) {
        const netif_tx_response_t *rsp = RING_GET_RESPONSE(&front->ring, front->ring.rsp_cons++);

        front->free[front->count++] = rsp->id % IDS;
    }
    if (front->count < batch * slots)
        return;
    for (uint32_t packet = 0; packet < batch; packet++) {
        uint32_t left = work->size, written = work->written;

        for (uint32_t slot = 0; slot < slots; slot++) {
            uint16_t id = front->free[--front->count];
            uint32_t part = left > PAGE ? PAGE : left;
            uint32_t write = written > part ? part : written;
            uint32_t offset = id * work->spread % (PAGE / 2);
            netif_tx_request_t *req = RING_GET_REQUEST(&front->ring, front->ring.req_prod_pvt++);

            if (write)
                memcpy(work->pages[id] + offset, work->payload, write);
            req->gref = work->refs ? work->refs[id] : id;
            req->offset = offset;
            req->flags = slot + 1 < slots ? NETTXF_more_data : 0;
            req->id = id;
            req->size = part;
            left -= part;
            written -= write;
        }
    }
    RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&front->ring, notify);
    (void)notify;
}

static void copy_by_xen(const struct work *work, struct back *back, uint32_t at, const netif_tx_request_t *req)
{
    struct gnttab_copy *op = &back->ops[at];

    op->source.u.ref = req->gref;
    op->source.domid = work->domain;
    op->source.offset = req->offset;
    op->dest.u.gmfn = work->frames[back->next];
    op->dest.domid = DOMID_SELF;
    op->dest.offset = 0;
    op->len = req->size;
    op->flags = GNTCOPY_source_gref;
}

static inline void back_turn(const struct work *work, struct back *back)
{
    const size_t stride = ((size_t)work->size % PAGE + 63) & ~(size_t)63;
    netif_tx_request_t taken[MOST];
    int notify;

    RING_IDX prod = back->ring.sring->req_prod;

    xen_rmb();
    while (back->ring.req_cons != prod) {
        uint32_t count = 0;

        while (count < MOST && back->ring.req_cons != prod) {
            netif_tx_request_t *req = &taken[count];

            RING_COPY_REQUEST(&back->ring, back->ring.req_cons, req);
            back->ring.req_cons++;
            if (work->copy)
                copy_by_xen(work, back, count, req);
            else if (req->size)
                memcpy(work->buffers + back->next * (work->size > PAGE ? PAGE : stride),
                       work->pages[req->gref % IDS] + req->offset, req->size);
            back->next = (back->next + 1) % IDS;
            count++;
        }
        if (work->copy)
            work->copy(work->xen, back->ops, count);
        for (uint32_t at = 0; at < count; at++) {
            netif_tx_response_t *rsp = RING_GET_RESPONSE(&back->ring, back->ring.rsp_prod_pvt++);

            rsp->id = taken[at].id;
            rsp->status = work->copy && back->ops[at].status ? NETIF_RSP_ERROR : NETIF_RSP_OKAY;
            back->done += !(taken[at].flags & NETTXF_more_data);
        }
        RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&back->ring, notify);
        (void)notify;
    }
}

void ring_h_front(const struct work *work, struct front *front, const volatile bool *over)
{
    while (!*over)
        front_turn(work, front);
}

void ring_h_back(const struct work *work, struct back *back, const volatile bool *over, volatile uint64_t *done)
{
    while (!*over) {
        back_turn(work, back);
        *done = back->done;
    }
}

/* Both ends in one thread; answers how many packets there were so far. */
uint64_t ring_h_step(const struct work *work, struct front *front, struct back *back)
{
    front_turn(work, front);
    back_turn(work, back);
    return back->done;
}
