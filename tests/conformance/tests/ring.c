/* One end of a ring, or both, made of the macros in io/ring.h. Obeys lines on standard input:
 * an end (f or b), a verb and a number. Answers each with a line. argv: kind of ring, file that is the page. */
#include <fcntl.h>
#include <stdio.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xen/xen.h>
#include <xen/io/netif.h>

static void fill_tx_req(struct netif_tx_request *r, unsigned n)
{
    r->gref = n * 3; r->offset = n; r->flags = n >> 1; r->id = n + 7; r->size = n * 5;
}
static void fill_rx_req(struct netif_rx_request *r, unsigned n)
{
    r->id = n; r->pad = 0; r->gref = n * 3;
}
static void fill_tx_rsp(struct netif_tx_response *r, unsigned n)
{
    r->id = n; r->status = -(int)(n % 3);
}
static void fill_rx_rsp(struct netif_rx_response *r, unsigned n)
{
    r->id = n; r->offset = n * 3; r->flags = n >> 1; r->status = n;
}

#define ENDS(k)                                                                   \
static void serve_##k(void *page)                                                 \
{                                                                                 \
    netif_##k##_front_ring_t f = {0};                                             \
    netif_##k##_back_ring_t b = {0};                                              \
    netif_##k##_sring_t *s = page;                                                \
    unsigned pushed = 0, answered = 0, n;                                         \
    char end, verb[16];                                                           \
    while (scanf(" %c %15s %u", &end, verb, &n) == 3) {                           \
        if (end == 'f') {                                                         \
            if (!strcmp(verb, "init")) {                                          \
                XEN_FRONT_RING_INIT(&f, s, 4096);                                 \
                s->req_prod = s->rsp_prod = n;                                    \
                s->req_event = s->rsp_event = n + 1;                              \
                FRONT_RING_ATTACH(&f, s, n, 4096);                                \
            } else if (!strcmp(verb, "push")) {                                   \
                for (; n > 0 && !RING_FULL(&f); n--)                              \
                    fill_##k##_req(RING_GET_REQUEST(&f, f.req_prod_pvt++), pushed++); \
                printf("%u", n);                                                  \
            } else if (!strcmp(verb, "publish")) {                                \
                int notify;                                                       \
                RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&f, notify);                  \
                printf("%d", notify);                                             \
            } else if (!strcmp(verb, "take")) {                                   \
                for (; n > 0 && XEN_RING_NR_UNCONSUMED_RESPONSES(&f); n--) {      \
                    struct netif_##k##_response r;                                \
                    unsigned char raw[sizeof r];                                  \
                    RING_COPY_RESPONSE(&f, f.rsp_cons, &r);                       \
                    f.rsp_cons++;                                                 \
                    memcpy(raw, &r, sizeof r);                                    \
                    for (size_t at = 0; at < sizeof r; at++)                      \
                        printf("%02x", raw[at]);                                  \
                    printf(" ");                                                  \
                }                                                                 \
            } else {                                                              \
                int work;                                                         \
                RING_FINAL_CHECK_FOR_RESPONSES(&f, work);                         \
                printf("%d", !!work);                                             \
            }                                                                     \
        } else {                                                                  \
            if (!strcmp(verb, "init")) {                                          \
                BACK_RING_ATTACH(&b, s, s->rsp_prod, 4096);                       \
            } else if (!strcmp(verb, "push")) {                                   \
                for (; n > 0 && b.rsp_prod_pvt != b.req_cons; n--)                \
                    fill_##k##_rsp(RING_GET_RESPONSE(&b, b.rsp_prod_pvt++), answered++); \
                printf("%u", n);                                                  \
            } else if (!strcmp(verb, "publish")) {                                \
                int notify;                                                       \
                RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&b, notify);                 \
                printf("%d", notify);                                             \
            } else if (!strcmp(verb, "take")) {                                   \
                for (; n > 0 && XEN_RING_NR_UNCONSUMED_REQUESTS(&b); n--) {       \
                    struct netif_##k##_request r;                                 \
                    unsigned char raw[sizeof r];                                  \
                    RING_COPY_REQUEST(&b, b.req_cons, &r);                        \
                    b.req_cons++;                                                 \
                    memcpy(raw, &r, sizeof r);                                    \
                    for (size_t at = 0; at < sizeof r; at++)                      \
                        printf("%02x", raw[at]);                                  \
                    printf(" ");                                                  \
                }                                                                 \
            } else {                                                              \
                int work;                                                         \
                RING_FINAL_CHECK_FOR_REQUESTS(&b, work);                          \
                printf("%d", !!work);                                             \
            }                                                                     \
        }                                                                         \
        printf("\n");                                                             \
        fflush(stdout);                                                           \
    }                                                                             \
}

ENDS(tx)
ENDS(rx)

int main(int argc, char **argv)
{
    int file = argc == 3 ? open(argv[2], O_RDWR) : -1;
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (page == MAP_FAILED)
        return 1;
    if (!strcmp(argv[1], "tx"))
        serve_tx(page);
    else
        serve_rx(page);
    return 0;
}
