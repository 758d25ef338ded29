//! Echo requests, one after another.

use alloc::format;
use alloc::string::String;
use alloc::vec;

use hypercall::Instant;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::icmp;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpAddress, Ipv6Address};

use super::Job;

/// Nanoseconds that an answer may take.
const PATIENCE: u64 = 1_000_000_000;
/// Nanoseconds from one answer to the next request.
const PAUSE: u64 = 10_000_000;
/// What is sent, as `ping` does: 56 bytes.
const PAYLOAD: [u8; 56] = [0x5a; 56];
/// Bytes of an echo message of either version.
const MESSAGE: usize = 8 + PAYLOAD.len();

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// The next is sent then.
    Pause(Instant),
    /// It was sent then.
    Sent(Instant),
}

pub(super) struct Ping {
    socket: SocketHandle,
    address: IpAddress,
    ident: u16,
    step: Step,
    left: u64,
    sent: u64,
    answered: u64,
    /// Nanoseconds of all answers together.
    nanos: u64,
}

impl Ping {
    pub(super) fn new(
        sockets: &mut SocketSet<'static>,
        job: Job,
        ident: u16,
        now: Instant,
    ) -> Result<Self, String> {
        let buffer = || {
            let (metadata, bytes) = (vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4 * 256]);
            icmp::PacketBuffer::new(metadata, bytes)
        };
        let mut socket = icmp::Socket::new(buffer(), buffer());
        if let Err(error) = socket.bind(icmp::Endpoint::Ident(ident)) {
            return Err(format!("failed: {error:?}"));
        }
        Ok(Self {
            socket: sockets.add(socket),
            address: job.address,
            ident,
            step: Step::Pause(now),
            left: job.count,
            sent: 0,
            answered: 0,
            nanos: 0,
        })
    }

    pub(super) fn socket(&self) -> SocketHandle {
        self.socket
    }

    pub(super) fn deadline(&self) -> Instant {
        match self.step {
            Step::Pause(until) => until,
            Step::Sent(at) => at.after(PATIENCE),
        }
    }

    /// Whether the socket has something new to send, and what there is to say in the end.
    pub(super) fn poll(
        &mut self,
        socket: &mut icmp::Socket<'_>,
        source: Option<IpAddress>,
        now: Instant,
    ) -> (bool, Option<String>) {
        while let Ok((bytes, from)) = socket.recv() {
            if let Step::Sent(at) = self.step
                && from == self.address
                && answers(bytes, from, self.ident, self.sent as u16)
            {
                if self.answered == 0 {
                    log::info!("ping {}: answered, {} sent", self.address, self.sent);
                }
                self.answered += 1;
                self.nanos += now.since(at);
                self.step = Step::Pause(now.after(PAUSE));
            }
        }
        if let Step::Sent(at) = self.step
            && at.after(PATIENCE) <= now
        {
            self.step = Step::Pause(now);
        }
        match self.step {
            Step::Pause(_) if self.left == 0 => {
                let tenths = (self.nanos / 100).checked_div(self.answered).unwrap_or(0);
                let lost = self.sent - self.answered;
                let (sent, whole, tenth) = (self.sent, tenths / 10, tenths % 10);
                (false, Some(format!("sent={sent} lost={lost} rtt_us={whole}.{tenth}")))
            }
            Step::Pause(until) if until <= now => {
                self.left -= 1;
                self.sent += 1;
                self.step = Step::Sent(now);
                if let Some(source) = source {
                    self.send(socket, source);
                }
                (true, None)
            }
            _ => (false, None),
        }
    }

    /// Sends a request. One that there is no room for is lost.
    fn send(&self, socket: &mut icmp::Socket<'_>, source: IpAddress) {
        let Ok(message) = socket.send(MESSAGE, self.address) else { return };
        let (ident, seq_no, data) = (self.ident, self.sent as u16, &PAYLOAD[..]);
        let sums = ChecksumCapabilities::default();
        match (source, self.address) {
            (IpAddress::Ipv4(_), IpAddress::Ipv4(_)) => {
                let mut packet = Icmpv4Packet::new_unchecked(message);
                Icmpv4Repr::EchoRequest { ident, seq_no, data }.emit(&mut packet, &sums);
            }
            (IpAddress::Ipv6(from), IpAddress::Ipv6(to)) => {
                let mut packet = Icmpv6Packet::new_unchecked(message);
                let request = Icmpv6Repr::EchoRequest { ident, seq_no, data };
                request.emit(&from, &to, &mut packet, &sums);
            }
            // There is no source of another version.
            _ => message.fill(0),
        }
    }
}

/// Whether it is the answer to that request.
fn answers(bytes: &[u8], from: IpAddress, wanted: u16, number: u16) -> bool {
    // The interface has checked the sums.
    let sums = ChecksumCapabilities::ignored();
    match from {
        IpAddress::Ipv4(_) => {
            let packet = Icmpv4Packet::new_checked(bytes);
            let parsed = packet.as_ref().map(|packet| Icmpv4Repr::parse(packet, &sums));
            matches!(
                parsed,
                Ok(Ok(Icmpv4Repr::EchoReply { ident, seq_no, .. }))
                    if (ident, seq_no) == (wanted, number)
            )
        }
        IpAddress::Ipv6(from) => {
            let packet = Icmpv6Packet::new_checked(bytes);
            let to = Ipv6Address::UNSPECIFIED;
            let parsed = packet.as_ref().map(|packet| Icmpv6Repr::parse(&from, &to, packet, &sums));
            matches!(
                parsed,
                Ok(Ok(Icmpv6Repr::EchoReply { ident, seq_no, .. }))
                    if (ident, seq_no) == (wanted, number)
            )
        }
    }
}
