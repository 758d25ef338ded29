//! Requests of 12 bytes one way and responses of 4 bytes back, and nothing else: queues that people use between threads, in the
//! place of a shared ring.

use crossbeam_queue::ArrayQueue;
use ringbuf::traits::{Consumer as _, Observer as _, Producer as _, Split as _};
use ringbuf::{HeapCons, HeapProd, HeapRb};
use rtrb::{Consumer, Producer, RingBuffer};

use crate::duel::{Control, Half, Subject};
use crate::peers::{IDS, MOST};

/// As large as `struct netif_tx_request`.
pub type Request = [u32; 3];
/// As large as `struct netif_tx_response`.
pub type Response = u32;

/// The one end of a queue.
pub trait Sender<T>: Send {
    /// Sends so many. There is room for them.
    fn send(&mut self, items: impl ExactSizeIterator<Item = T>);
}

/// The other.
pub trait Receiver<T>: Send {
    /// Takes what there is, up to `most`; answers how many.
    fn receive(&mut self, most: usize, each: impl FnMut(T)) -> usize;
}

impl<T: Send> Sender<T> for Producer<T> {
    fn send(&mut self, items: impl ExactSizeIterator<Item = T>) {
        if let Ok(chunk) = self.write_chunk_uninit(items.len()) {
            chunk.fill_from_iter(items);
        }
    }
}

impl<T: Send> Receiver<T> for Consumer<T> {
    fn receive(&mut self, most: usize, each: impl FnMut(T)) -> usize {
        let count = self.slots().min(most);
        if let Ok(chunk) = self.read_chunk(count) {
            chunk.into_iter().for_each(each);
        }
        count
    }
}

impl<T: Send> Sender<T> for HeapProd<T> {
    fn send(&mut self, items: impl ExactSizeIterator<Item = T>) {
        self.push_iter(items);
    }
}

impl<T: Send> Receiver<T> for HeapCons<T> {
    fn receive(&mut self, most: usize, each: impl FnMut(T)) -> usize {
        let count = self.occupied_len().min(most);
        self.pop_iter().take(count).for_each(each);
        count
    }
}

impl<T: Send> Sender<T> for &ArrayQueue<T> {
    fn send(&mut self, items: impl ExactSizeIterator<Item = T>) {
        for item in items {
            // There is room.
            let _ = self.push(item);
        }
    }
}

impl<T: Send> Receiver<T> for &ArrayQueue<T> {
    fn receive(&mut self, most: usize, mut each: impl FnMut(T)) -> usize {
        let mut count = 0;
        while count < most
            && let Some(item) = self.pop()
        {
            each(item);
            count += 1;
        }
        count
    }
}

fn front<'a>(
    mut requests: impl Sender<Request> + 'a,
    mut responses: impl Receiver<Response> + 'a,
    batch: usize,
) -> Half<'a> {
    Box::new(move |control: &Control| {
        let (mut free, mut sum) = (IDS, 0_u32);
        while !control.is_over() {
            free += responses.receive(IDS, |response| sum = sum.wrapping_add(response));
            if free >= batch {
                requests.send((0..batch as u32).map(|id| [id, sum, 64]));
                free -= batch;
            }
        }
    })
}

fn back<'a>(
    mut requests: impl Receiver<Request> + 'a,
    mut responses: impl Sender<Response> + 'a,
) -> Half<'a> {
    Box::new(move |control: &Control| {
        let mut done = 0;
        let mut ids = [0; MOST];
        while !control.is_over() {
            let mut places = ids.iter_mut();
            let count = requests.receive(MOST, |[id, _, size]| {
                if let Some(place) = places.next() {
                    *place = id ^ size;
                }
            });
            responses.send(ids.iter().copied().take(count));
            done += count as u64;
            control.set_done(done);
        }
    })
}

/// Which queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Queue {
    Rtrb,
    Ringbuf,
    Crossbeam,
}

impl Queue {
    pub const ALL: [Self; 3] = [Self::Rtrb, Self::Ringbuf, Self::Crossbeam];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Rtrb => "rtrb, chunks",
            Self::Ringbuf => "ringbuf",
            Self::Crossbeam => "crossbeam ArrayQueue",
        }
    }
}

/// A pair of them, made anew for each sample.
pub struct Descriptors {
    queue: Queue,
    batch: usize,
    crossed: (ArrayQueue<Request>, ArrayQueue<Response>),
}

impl Descriptors {
    pub fn new(queue: Queue, batch: usize) -> Self {
        Self { queue, batch, crossed: (ArrayQueue::new(IDS), ArrayQueue::new(IDS)) }
    }
}

impl Subject for Descriptors {
    fn halves(&mut self) -> [Half<'_>; 2] {
        let batch = self.batch;
        match self.queue {
            Queue::Rtrb => {
                let (request, requests) = RingBuffer::<Request>::new(IDS);
                let (response, responses) = RingBuffer::<Response>::new(IDS);
                [front(request, responses, batch), back(requests, response)]
            }
            Queue::Ringbuf => {
                let (request, requests) = HeapRb::<Request>::new(IDS).split();
                let (response, responses) = HeapRb::<Response>::new(IDS).split();
                [front(request, responses, batch), back(requests, response)]
            }
            Queue::Crossbeam => {
                self.crossed = (ArrayQueue::new(IDS), ArrayQueue::new(IDS));
                let (requests, responses) = &self.crossed;
                [front(requests, responses, batch), back(requests, responses)]
            }
        }
    }
}
