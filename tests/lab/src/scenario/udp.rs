//! UDP from guest 1 to guest 2: what arrives is intact, what does not is counted.

use anyhow::{Result, bail, ensure};

use crate::console::Source;
use crate::metrics::Metrics;
use crate::run::{Answer, Run};

/// The counters that have to add up for what one guest sends to the other, all read while nothing moves.
pub struct Books {
    way: Way,
    /// The sender's own counters.
    sender: Answer,
    /// The receiver's own counters.
    receiver: Answer,
    /// dom0's, as the sender reads them: what they say of the receiver's vif is not disturbed by the reading.
    of_receiver: Metrics,
    /// dom0's, as the receiver reads them, for the sender's vif.
    of_sender: Metrics,
}

/// Which guest sends, and to which.
#[derive(Clone, Copy)]
pub struct Way {
    /// The sender.
    pub from: usize,
    /// The receiver.
    pub to: usize,
}

impl Books {
    fn read(run: &Run, way: Way, label: &str) -> Result<Self> {
        let Way { from, to } = way;
        let of_receiver = run.metrics(from, &format!("{label}-vif{to}"))?;
        let receiver = run.good(to, "cnt", 20)?;
        let of_sender = run.metrics(to, &format!("{label}-vif{from}"))?;
        let sender = run.good(from, "cnt", 20)?;
        Ok(Self { way, sender, receiver, of_receiver, of_sender })
    }

    /// Who sends, and to whom.
    pub fn way(&self) -> Way {
        self.way
    }

    /// Reads until two readings in a row agree: a frame that somebody sends between looking at one counter and at the
    /// next (an ARP request, say) is in one of them and not in the other.
    pub fn steady(run: &Run, way: Way, label: &str) -> Result<Self> {
        // dom0 may have forgotten where the guests are, and would ask everybody between two readings.
        for domain in 1..=2 {
            run.good(domain, "pings 4:1 56 2", 20)?;
        }
        let mut last = Self::read(run, way, label)?;
        for _ in 0..4 {
            let next = Self::read(run, way, label)?;
            let change = Change::between(&last, &next)?;
            if change.sent == change.taken + change.refused && change.given == change.received {
                return Ok(next);
            }
            last = next;
        }
        bail!("the counters never agree, though nothing moves")
    }
}

/// What changed between two readings, in frames.
pub struct Change {
    way: Way,
    sent: f64,
    sender_lost: f64,
    taken: f64,
    refused: f64,
    given: f64,
    dropped: f64,
    received: f64,
    receiver_lost: f64,
}

impl Change {
    pub fn between(before: &Books, after: &Books) -> Result<Self> {
        let own = |old: &Answer, new: &Answer, names: &[&str]| -> Result<f64> {
            names.iter().map(|n| Ok(new.number(n)? - old.number(n)?)).sum()
        };
        let theirs =
            |old: &Metrics, new: &Metrics, name: &str, vif: &str, dir: &str| -> Result<f64> {
                let labels = [("vif", vif), ("dir", dir)];
                // A kind of drop that never happened may not be listed.
                let old = old.get(name, &labels).unwrap_or(0.0);
                Ok(if name.contains("drops") {
                    new.get(name, &labels).unwrap_or(0.0) - old
                } else {
                    new.need(name, &labels)? - old
                })
            };
        let (packets, drops) = ("netback_vif_packets_total", "netback_vif_drops_total");
        let way = after.way;
        let (from, to) = (&*format!("{}.0", way.from), &*format!("{}.0", way.to));
        let (s, r) =
            ((&before.of_sender, &after.of_sender), (&before.of_receiver, &after.of_receiver));
        Ok(Self {
            way,
            sent: own(&before.sender, &after.sender, &["tx_packets"])?,
            sender_lost: own(&before.sender, &after.sender, &["tx_dropped", "udp_sndbuf"])?,
            taken: theirs(s.0, s.1, packets, from, "tx")?,
            refused: theirs(s.0, s.1, drops, from, "tx")?,
            given: theirs(r.0, r.1, packets, to, "rx")?,
            dropped: theirs(r.0, r.1, drops, to, "rx")?,
            received: own(&before.receiver, &after.receiver, &["rx_packets"])?,
            receiver_lost: own(
                &before.receiver,
                &after.receiver,
                &["rx_dropped", "rx_errors", "udp_rcvbuf", "udp_csum"],
            )?,
        })
    }
}

impl Change {
    /// Frames that dom0 dropped, and that the guests' own kernels did.
    pub fn lost(&self) -> (f64, f64) {
        (self.refused + self.dropped, self.sender_lost + self.receiver_lost)
    }

    /// Every frame that the sender sent was taken or counted as dropped, and every frame that dom0 gave arrived.
    pub fn check(&self, run: &mut Run, label: &str) {
        let Self { way: Way { from, to }, sent, taken, refused, given, received, .. } = *self;
        let made = (|| {
            ensure!(
                sent == taken + refused,
                "guest {from} sent {sent} frames, vif{from}.0 took {taken} and dropped {refused}"
            );
            Ok(format!(
                "guest {from} sent {sent} frames = vif{from}.0 took {taken} + dropped {refused}"
            ))
        })();
        run.check(&format!("frames into dom0 add up, {label}"), Source::Dom(0), made);
        let made = (|| {
            ensure!(given == received, "vif{to}.0 gave {given} frames, guest {to} got {received}");
            Ok(format!("vif{to}.0 gave {given} frames = guest {to} got {received}"))
        })();
        run.check(&format!("frames out of dom0 add up, {label}"), Source::Dom(0), made);
    }
}

/// The way of all datagrams here.
const WAY: Way = Way { from: 1, to: 2 };

/// Sends datagrams; returns how many were sent and how many arrived, all of those intact and none twice.
fn burst(run: &Run, size: u32, count: u32) -> Result<(f64, f64)> {
    run.good(2, "urecv 9000", 20)?;
    let sent = run.good(1, &format!("usend 4:12 9000 {size} {count}"), 60)?;
    let got = run.good(2, "udone", 60)?;
    let text = got.text();
    ensure!(got.number("corrupt")? == 0.0, "corrupt datagrams: {text}");
    ensure!(got.number("duplicate")? == 0.0, "datagrams that came twice: {text}");
    ensure!(got.number("got")? > 0.0, "nothing arrives");
    Ok((sent.number("sent")?, got.number("got")?))
}

/// Bursts of datagrams, and the counters since `before`; answers how the counters stand afterwards.
fn bursts(run: &mut Run, label: &str, list: &[(u32, u32)], before: &Books) -> Option<Books> {
    let (mut sent, mut got) = (0.0, 0.0);
    for (size, count) in list {
        let made = burst(run, *size, *count);
        if let Ok((s, g)) = made {
            sent += s;
            got += g;
            run.figure(format!("udp_{size}_delivered_percent"), 100.0 * g / s);
        }
        let made = made.map(|(s, g)| format!("{g} of {s} arrive, all intact, none twice"));
        run.check(&format!("UDP, {size} bytes"), Source::Dom(2), made);
    }
    let read = Books::steady(run, WAY, label)
        .and_then(|after| Ok((Change::between(before, &after)?, after)));
    let (change, after) = match read {
        Ok(read) => read,
        Err(error) => {
            run.check(&format!("UDP counters, {label}"), Source::Dom(1), Err(error));
            return None;
        }
    };
    change.check(run, label);
    let lost = sent - got;
    let (dropped, guests) = change.lost();
    let counted = dropped + guests;
    let text =
        format!("{lost} datagrams lost; dom0 dropped {dropped} frames, guests lost {guests}");
    let agree = if label == "fragmented" {
        // One lost frame loses a datagram, and several may be of the same one.
        lost <= counted && (lost > 0.0) == (counted > 0.0)
    } else {
        lost == counted
    };
    let made = if agree { Ok(text) } else { Err(anyhow::anyhow!(text)) };
    run.check(&format!("drops are counted, {label}"), Source::Dom(0), made);
    Some(after)
}

/// All sizes: whole datagrams, where every frame is one, then fragmented ones.
pub fn all(run: &mut Run) {
    let before = match Books::steady(run, WAY, "start") {
        Ok(before) => before,
        Err(error) => {
            run.check("UDP counters, start", Source::Dom(1), Err(error));
            return;
        }
    };
    let whole = [(64, 3000), (512, 2000), (1472, 2000)];
    if let Some(before) = bursts(run, "whole", &whole, &before) {
        bursts(run, "fragmented", &[(20_000, 300)], &before);
    }
}
