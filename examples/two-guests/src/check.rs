//! What became of numbered things.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::AddAssign;

/// Numbers that may be missing at once: a stranger's number is not worth a gigabyte of bookkeeping.
const MAX_GAP: u64 = 1 << 16;

/// Which numbers of a sequence have come.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    next: u64,
    missing: BTreeSet<u64>,
    duplicated: u64,
    reordered: u64,
}

/// A number that is far beyond all that is to be expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absurd;

impl Sequence {
    /// A number came.
    ///
    /// # Errors
    /// [`Absurd`]: it cannot be right, and is not taken.
    pub fn came(&mut self, number: u64) -> Result<(), Absurd> {
        if number >= self.next {
            if number - self.next > MAX_GAP {
                return Err(Absurd);
            }
            self.missing.extend(self.next..number);
            self.next = number + 1;
        } else if self.missing.remove(&number) {
            self.reordered += 1;
        } else {
            self.duplicated += 1;
        }
        Ok(())
    }

    /// How many different ones came.
    #[must_use]
    pub fn unique(&self) -> u64 {
        self.next - self.missing.len() as u64
    }

    /// One more than the greatest that came.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// What became of them, if `sent` were sent and none is on its way.
    #[must_use]
    pub fn tally(&self, sent: u64) -> Tally {
        Tally {
            sent,
            received: self.unique(),
            lost: sent.saturating_sub(self.unique()),
            duplicated: self.duplicated,
            reordered: self.reordered,
            // More than were sent: somebody made them up.
            corrupt: self.unique().saturating_sub(sent),
            excused: 0,
        }
    }
}

/// What became of what was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Sent.
    pub sent: u64,
    /// Different ones that came.
    pub received: u64,
    /// Sent, and never came though both ends lived to the end.
    pub lost: u64,
    /// Came again.
    pub duplicated: u64,
    /// Came after one that was sent later in the same flow.
    pub reordered: u64,
    /// Came as something that was not sent.
    pub corrupt: u64,
    /// Did not come, for good reason: an end, or the backend between them, went away with them.
    pub excused: u64,
}

impl Tally {
    /// Whether all came, once, in order and whole.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        [self.lost, self.duplicated, self.reordered, self.corrupt] == [0; 4]
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.received += other.received;
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.reordered += other.reordered;
        self.corrupt += other.corrupt;
        self.excused += other.excused;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lost, duplicated, reordered, corrupt, .. } = self;
        write!(f, "lost {lost} duplicated {duplicated} reordered {reordered} corrupt {corrupt}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(numbers: &[u64], sent: u64) -> String {
        let mut sequence = Sequence::default();
        for number in numbers {
            assert_eq!(sequence.came(*number), Ok(()));
        }
        sequence.tally(sent).to_string()
    }

    #[test]
    fn each_kind_of_trouble_is_told_from_the_others() {
        assert_eq!(after(&[0, 1, 2, 3], 4), "lost 0 duplicated 0 reordered 0 corrupt 0");
        assert_eq!(after(&[0, 1, 3], 4), "lost 1 duplicated 0 reordered 0 corrupt 0");
        assert_eq!(after(&[0, 1, 2], 4), "lost 1 duplicated 0 reordered 0 corrupt 0");
        assert_eq!(after(&[0, 1, 1, 2, 3, 0], 4), "lost 0 duplicated 2 reordered 0 corrupt 0");
        assert_eq!(after(&[1, 2, 0, 3], 4), "lost 0 duplicated 0 reordered 1 corrupt 0");
        assert_eq!(after(&[2, 0, 0, 3], 4), "lost 1 duplicated 1 reordered 1 corrupt 0");
        assert_eq!(after(&[0, 1, 2, 3], 3), "lost 0 duplicated 0 reordered 0 corrupt 1");
        assert_eq!(Sequence::default().came(u64::MAX), Err(Absurd));
    }
}
