/* Both ends of a TX ring by the macros of Xen's io/ring.h, in one thread. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* What a port of ring.h has to bring along: on x86 only the full barrier is an instruction. */
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)

#include <xen/xen.h>
#include <xen/io/netif.h>

#define SLOTS 256
#define PAGE 4096

struct peer {
    netif_tx_front_ring_t front;
    netif_tx_back_ring_t back;
    unsigned char (*pages)[PAGE];
    uint16_t free[SLOTS];
    unsigned nr_free;
};

static struct peer peer;
static unsigned char ring[PAGE] __attribute__((aligned(PAGE)));
static unsigned char pages[SLOTS][PAGE] __attribute__((aligned(PAGE)));

void peer_init(void)
{
    netif_tx_sring_t *shared = (void *)ring;

    XEN_FRONT_RING_INIT(&peer.front, shared, PAGE);
    BACK_RING_ATTACH(&peer.back, shared, 0, PAGE);
    peer.pages = pages;
    for (unsigned id = 0; id < SLOTS; id++)
        peer.free[peer.nr_free++] = id;
}

/* Sends `count` packets of `size` bytes, takes them into `to`, answers them, and takes the answers. With no bytes it is the
 * descriptors alone. Answers how often somebody would have been notified, or -1 if something does not fit. */
static inline __attribute__((always_inline)) int
batch(unsigned count, const unsigned char *packet, unsigned size, unsigned char *to)
{
    int notifications = 0, notify, work;

    for (unsigned i = 0; i < count; i++) {
        netif_tx_request_t *request;
        uint16_t id;

        if (peer.nr_free == 0 || RING_FULL(&peer.front))
            return -1;
        id = peer.free[--peer.nr_free];
        if (size)
            memcpy(peer.pages[id], packet, size);
        request = RING_GET_REQUEST(&peer.front, peer.front.req_prod_pvt++);
        request->gref = id;
        request->offset = 0;
        request->flags = 0;
        request->id = id;
        request->size = size;
    }
    RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&peer.front, notify);
    notifications += notify;

    for (;;) {
        while (XEN_RING_NR_UNCONSUMED_REQUESTS(&peer.back)) {
            netif_tx_response_t *response;
            netif_tx_request_t request;

            RING_COPY_REQUEST(&peer.back, peer.back.req_cons, &request);
            peer.back.req_cons++;
            if (request.gref >= SLOTS || request.offset + request.size > PAGE)
                return -1;
            if (request.size != size)
                return -1;
            if (size)
                memcpy(to, peer.pages[request.gref] + request.offset, size);
            response = RING_GET_RESPONSE(&peer.back, peer.back.rsp_prod_pvt++);
            response->id = request.id;
            response->status = NETIF_RSP_OKAY;
        }
        RING_FINAL_CHECK_FOR_REQUESTS(&peer.back, work);
        if (!work)
            break;
    }
    RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&peer.back, notify);
    notifications += notify;

    for (;;) {
        while (XEN_RING_NR_UNCONSUMED_RESPONSES(&peer.front)) {
            netif_tx_response_t response;

            RING_COPY_RESPONSE(&peer.front, peer.front.rsp_cons, &response);
            peer.front.rsp_cons++;
            if (response.id >= SLOTS || response.status != NETIF_RSP_OKAY)
                return -1;
            peer.free[peer.nr_free++] = response.id;
        }
        RING_FINAL_CHECK_FOR_RESPONSES(&peer.front, work);
        if (!work)
            break;
    }
    return notifications;
}

/* One for each size, so that the compiler knows it. */
int peer_descriptors(unsigned count, const unsigned char *packet, unsigned char *to)
{
    return batch(count, packet, 0, to);
}

int peer_copy_64(unsigned count, const unsigned char *packet, unsigned char *to)
{
    return batch(count, packet, 64, to);
}

int peer_copy_1500(unsigned count, const unsigned char *packet, unsigned char *to)
{
    return batch(count, packet, 1500, to);
}
