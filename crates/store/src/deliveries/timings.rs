//! Where the time of a try went.

/// Bits of one part. The longest that can be told is 35 minutes, more than any deadline.
const PART_BITS: u32 = 21;
const PART_MAX: u64 = (1 << PART_BITS) - 1;

/// Parts of a try's duration. What did not happen, as name and connection on a kept connection, is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Until the name was resolved.
    pub dns_ms: Option<u64>,
    /// A new connection: name, TCP and TLS.
    pub connect_ms: Option<u64>,
    /// From the start to the headers of the answer.
    pub first_byte_ms: Option<u64>,
}

impl Timings {
    /// All of them in one positive number, for the row of a delivery; `None` if nothing was measured. On a kept
    /// connection it is a small number, which takes one or two bytes in SQLite.
    pub(super) fn pack(self) -> Option<i64> {
        // 0 says that a part did not happen.
        let part = |ms: Option<u64>| ms.map_or(0, |ms| ms.min(PART_MAX - 1) + 1);
        let packed = [self.dns_ms, self.connect_ms, self.first_byte_ms]
            .into_iter()
            .fold(0, |packed, ms| packed << PART_BITS | part(ms));
        i64::try_from(packed).ok().filter(|packed| *packed != 0)
    }

    /// Reads [`Self::pack`] back.
    #[must_use]
    pub(crate) fn unpack(packed: Option<i64>) -> Self {
        let packed = packed.and_then(|packed| u64::try_from(packed).ok()).unwrap_or_default();
        let part = |place: u32| (packed >> (place * PART_BITS) & PART_MAX).checked_sub(1);
        Self { dns_ms: part(2), connect_ms: part(1), first_byte_ms: part(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timings_survive_being_packed() {
        let all = [None, Some(0), Some(1), Some(29_999), Some(PART_MAX - 1)];
        for dns_ms in all {
            for connect_ms in all {
                for first_byte_ms in all {
                    let timings = Timings { dns_ms, connect_ms, first_byte_ms };
                    assert_eq!(Timings::unpack(timings.pack()), timings);
                }
            }
        }
        assert_eq!(Timings::default().pack(), None);
        let kept = Timings { first_byte_ms: Some(100), ..Timings::default() };
        assert_eq!(kept.pack(), Some(101), "small where a connection was kept");
        let endless = Timings { first_byte_ms: Some(u64::MAX), ..Timings::default() };
        assert_eq!(Timings::unpack(endless.pack()).first_byte_ms, Some(PART_MAX - 1));
    }
}
