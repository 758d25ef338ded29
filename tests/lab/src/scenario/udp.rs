//! UDP from guest 1 to guest 2: what arrives is intact, what does not is counted.

use anyhow::{Result, bail, ensure};

use crate::console::Source;
use crate::metrics::Metrics;
use crate::run::{Answer, Run};

/// The counters that have to add up, all read while nothing moves.
struct Books {
    /// Guest 1's own counters.
    sender: Answer,
    /// Guest 2's own counters.
    receiver: Answer,
    /// dom0's, as guest 1 reads them: what they say of vif2.0 is not disturbed by the reading.
    of_receiver: Metrics,
    /// dom0's, as guest 2 reads them, for vif1.0.
    of_sender: Metrics,
}

impl Books {
    fn read(run: &Run, label: &str) -> Result<Self> {
        let of_receiver = run.metrics(1, &format!("{label}-vif2"))?;
        let receiver = run.good(2, "cnt", 20)?;
        let of_sender = run.metrics(2, &format!("{label}-vif1"))?;
        let sender = run.good(1, "cnt", 20)?;
        Ok(Self { sender, receiver, of_receiver, of_sender })
    }

    /// Reads until two readings in a row agree: a frame that somebody sends between looking at one counter and at the
    /// next (an ARP request, say) is in one of them and not in the other.
    fn steady(run: &Run, label: &str) -> Result<Self> {
        // dom0 may have forgotten where the guests are, and would ask everybody between two readings.
        for domain in 1..=2 {
            run.good(domain, "pings 4:1 56 2", 20)?;
        }
        let mut last = Self::read(run, label)?;
        for _ in 0..4 {
            let next = Self::read(run, label)?;
            let change = Change::between(&last, &next)?;
            if change.sent == change.taken + change.refused && change.given == change.received {
                return Ok(next);
            }
            last = next;
        }
        bail!("the counters never agree, though nothing moves")
    }
}

/// What changed between two readings.
struct Change {
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
    fn between(before: &Books, after: &Books) -> Result<Self> {
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
        let (s, r) =
            ((&before.of_sender, &after.of_sender), (&before.of_receiver, &after.of_receiver));
        Ok(Self {
            sent: own(&before.sender, &after.sender, &["tx_packets"])?,
            sender_lost: own(&before.sender, &after.sender, &["tx_dropped", "udp_sndbuf"])?,
            taken: theirs(s.0, s.1, packets, "1.0", "tx")?,
            refused: theirs(s.0, s.1, drops, "1.0", "tx")?,
            given: theirs(r.0, r.1, packets, "2.0", "rx")?,
            dropped: theirs(r.0, r.1, drops, "2.0", "rx")?,
            received: own(&before.receiver, &after.receiver, &["rx_packets"])?,
            receiver_lost: own(
                &before.receiver,
                &after.receiver,
                &["rx_dropped", "rx_errors", "udp_rcvbuf", "udp_csum"],
            )?,
        })
    }
}

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
    let read =
        Books::steady(run, label).and_then(|after| Ok((Change::between(before, &after)?, after)));
    let (change, after) = match read {
        Ok(read) => read,
        Err(error) => {
            run.check(&format!("UDP counters, {label}"), Source::Dom(1), Err(error));
            return None;
        }
    };
    let Change { sent: frames, taken, refused, given, received, dropped, .. } = change;
    let made = (|| {
        ensure!(
            frames == taken + refused,
            "guest 1 sent {frames} frames, vif1.0 took {taken} and dropped {refused}"
        );
        Ok(format!("guest 1 sent {frames} frames = vif1.0 took {taken} + dropped {refused}"))
    })();
    run.check(&format!("frames into dom0 add up, {label}"), Source::Dom(0), made);
    let made = (|| {
        ensure!(given == received, "vif2.0 gave {given} frames, guest 2 got {received}");
        Ok(format!("vif2.0 gave {given} frames = guest 2 got {received}"))
    })();
    run.check(&format!("frames out of dom0 add up, {label}"), Source::Dom(0), made);
    let lost = sent - got;
    let counted = refused + dropped + change.sender_lost + change.receiver_lost;
    let text = format!(
        "{lost} datagrams lost; dom0 dropped {} frames, guests lost {}",
        refused + dropped,
        change.sender_lost + change.receiver_lost
    );
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
    let before = match Books::steady(run, "start") {
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
