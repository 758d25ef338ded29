//! What the card has, and for how long.

use hypercall::Instant;

/// Counts what is with the card in two generations, so that whatever it does not give back is noticed, in whichever order it gives
/// back the rest, and none of it has to be remembered. What is sent joins the younger; when the last of the elder is back, the
/// younger takes its place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Flight {
    /// Number of the elder generation.
    generation: u32,
    elder: usize,
    younger: usize,
    /// All of the elder has been with the card since.
    since: Instant,
}

/// Which generation something was sent with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Generation(u32);

impl Flight {
    /// How much there is.
    pub(super) const fn len(&self) -> usize {
        self.elder + self.younger
    }

    /// Since when the card has had something at least, if it has anything.
    pub(super) fn since(&self) -> Option<Instant> {
        (self.elder > 0).then_some(self.since)
    }

    /// What the next thing is sent with.
    pub(super) const fn next(&self) -> Generation {
        match self.elder {
            0 => Generation(self.generation),
            _ => Generation(self.generation.wrapping_add(1)),
        }
    }

    /// The card has one thing more, of the [`next`](Self::next) generation.
    pub(super) const fn left(&mut self, now: Instant) {
        if self.elder == 0 {
            self.elder = 1;
            self.since = now;
        } else {
            self.younger += 1;
        }
    }

    /// It is done with one.
    pub(super) const fn came_back(&mut self, of: Generation, now: Instant) {
        if of.0 == self.generation.wrapping_add(1) {
            self.younger = self.younger.saturating_sub(1);
        } else if of.0 == self.generation {
            self.elder = self.elder.saturating_sub(1);
            if self.elder == 0 {
                self.elder = self.younger;
                self.younger = 0;
                self.since = now;
                self.generation = self.generation.wrapping_add(1);
            }
        }
    }

    /// The card has nothing any more; answers how much it had.
    pub(super) fn lose(&mut self) -> usize {
        let lost = self.len();
        *self = Self { generation: self.generation.wrapping_add(2), ..Self::default() };
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_stays_is_noticed_though_others_come_and_go() {
        let mut flight = Flight::default();
        assert_eq!(flight.since(), None);
        let stays = flight.next();
        flight.left(Instant(10));
        for time in 20..200 {
            let other = flight.next();
            flight.left(Instant(time));
            assert_ne!(other, stays);
            flight.came_back(other, Instant(time));
            assert_eq!((flight.since(), flight.len()), (Some(Instant(10)), 1));
        }
        flight.came_back(stays, Instant(300));
        assert_eq!((flight.since(), flight.len()), (None, 0));
    }

    #[test]
    fn the_younger_take_the_place_of_the_elder() {
        let mut flight = Flight::default();
        let first = flight.next();
        flight.left(Instant(10));
        let second = flight.next();
        flight.left(Instant(20));
        flight.left(Instant(30));
        flight.came_back(first, Instant(40));
        assert_eq!((flight.since(), Generation(flight.generation)), (Some(Instant(40)), second));
        flight.came_back(second, Instant(50));
        assert_eq!(flight.since(), Some(Instant(40)));
        flight.came_back(second, Instant(60));
        assert_eq!(flight.since(), None);
    }

    #[test]
    fn what_comes_back_after_all_was_lost_counts_for_nothing() {
        let mut flight = Flight::default();
        let old = [flight.next(), {
            flight.left(Instant(1));
            flight.next()
        }];
        flight.left(Instant(1));
        assert_eq!(flight.lose(), 2);
        let new = flight.next();
        flight.left(Instant(2));
        for of in old {
            flight.came_back(of, Instant(3));
            assert_eq!(flight.len(), 1);
        }
        flight.came_back(new, Instant(4));
        assert_eq!(flight.len(), 0);
    }
}
