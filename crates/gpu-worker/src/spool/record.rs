//! One record: `length u32 | crc32 u32 | version u8 | kind u8 | id u64 | payload`, little endian. The
//! checksum covers everything after itself.

/// Bytes before the payload.
pub(crate) const HEADER_BYTES: usize = 8 + BODY_HEADER_BYTES;
const BODY_HEADER_BYTES: usize = 10;
/// No record is longer; a longer length is a torn or foreign file.
const MAX_RECORD_BYTES: usize = 512 * 1024 * 1024;
const VERSION: u8 = 1;
const KIND_OUTCOME: u8 = 1;
const KIND_DONE: u8 = 2;

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An outcome that must reach the tracker.
    Outcome {
        /// Its number.
        id: u64,
        /// The encoded outcome.
        payload: Vec<u8>,
    },
    /// The outcome of this number reached it.
    Done {
        /// Its number.
        id: u64,
    },
}

/// Why bytes are no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The file ends inside the record.
    #[error("the file ends inside a record")]
    Torn,
    /// Length or checksum are wrong; `skip` bytes belong to it, if that can be told.
    #[error("a record is damaged")]
    Damaged {
        /// Where the next record would start.
        skip: Option<usize>,
    },
}

impl Record {
    pub(crate) fn encode_outcome(id: u64, payload: &[u8]) -> Vec<u8> {
        encode(KIND_OUTCOME, id, payload)
    }

    pub(crate) fn encode_done(id: u64) -> Vec<u8> {
        encode(KIND_DONE, id, &[])
    }

    /// Reads the record at the start of `bytes`, and its length.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), RecordError> {
        let header: [u8; 8] = bytes.get(..8).and_then(|h| h.try_into().ok()).ok_or(RecordError::Torn)?;
        let [l0, l1, l2, l3, c0, c1, c2, c3] = header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let checksum = u32::from_le_bytes([c0, c1, c2, c3]);
        if !(BODY_HEADER_BYTES..=MAX_RECORD_BYTES).contains(&length) {
            return Err(RecordError::Damaged { skip: None });
        }
        let body = bytes.get(8..8 + length).ok_or(RecordError::Torn)?;
        let damaged = RecordError::Damaged { skip: Some(8 + length) };
        if crc32(body) != checksum {
            return Err(damaged);
        }
        let (head, payload) = body.split_at(BODY_HEADER_BYTES);
        let id = head.get(2..).and_then(|id| id.try_into().ok()).map(u64::from_le_bytes).ok_or(damaged)?;
        match (head[0], head[1]) {
            (VERSION, KIND_OUTCOME) => Ok((Self::Outcome { id, payload: payload.to_vec() }, 8 + length)),
            (VERSION, KIND_DONE) => Ok((Self::Done { id }, 8 + length)),
            _ => Err(damaged),
        }
    }
}

fn encode(kind: u8, id: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + payload.len());
    let length = u32::try_from(BODY_HEADER_BYTES + payload.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.push(VERSION);
    out.push(kind);
    out.extend_from_slice(&id.to_le_bytes());
    out.extend_from_slice(payload);
    let checksum = crc32(&out[8..]);
    out[4..8].copy_from_slice(&checksum.to_le_bytes());
    out
}

/// CRC-32 (IEEE 802.3), eight bytes at a time ("slicing by 8"): outputs of tens of megabytes pass here.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = !0_u32;
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let low = crc ^ u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        let [a, b, c, d] = low.to_le_bytes();
        crc = TABLES[7][a as usize]
            ^ TABLES[6][b as usize]
            ^ TABLES[5][c as usize]
            ^ TABLES[4][d as usize]
            ^ TABLES[3][chunk[4] as usize]
            ^ TABLES[2][chunk[5] as usize]
            ^ TABLES[1][chunk[6] as usize]
            ^ TABLES[0][chunk[7] as usize];
    }
    for &byte in chunks.remainder() {
        crc = TABLES[0][((crc ^ u32::from(byte)) & 0xff) as usize] ^ (crc >> 8);
    }
    !crc
}

static TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0_u32; 256]; 8];
    let mut n = 0;
    while n < 256 {
        let mut value = n as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { 0xedb8_8320 ^ (value >> 1) } else { value >> 1 };
            bit += 1;
        }
        tables[0][n] = value;
        n += 1;
    }
    let mut level = 1;
    while level < 8 {
        let mut n = 0;
        while n < 256 {
            let before = tables[level - 1][n];
            tables[level][n] = tables[0][(before & 0xff) as usize] ^ (before >> 8);
            n += 1;
        }
        level += 1;
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(b""), 0);
        assert_eq!(crc32(b"The quick brown fox jumps over the lazy dog"), 0x414f_a339);
    }

    proptest! {
        #[test]
        fn reads_back_and_notices_every_flipped_bit(
            id in any::<u64>(),
            payload in proptest::collection::vec(any::<u8>(), 0..300),
            bit in any::<prop::sample::Index>(),
        ) {
            let bytes = Record::encode_outcome(id, &payload);
            let back = Record::decode(&bytes);
            prop_assert_eq!(back, Ok((Record::Outcome { id, payload }, bytes.len())));
            let mut flipped = bytes.clone();
            let bit = bit.index(bytes.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Record::decode(&flipped).is_err());
        }

        #[test]
        fn a_cut_record_is_torn(payload in proptest::collection::vec(any::<u8>(), 0..100), at in any::<prop::sample::Index>()) {
            let bytes = Record::encode_outcome(1, &payload);
            let cut = at.index(bytes.len());
            prop_assert_eq!(Record::decode(&bytes[..cut]), Err(RecordError::Torn));
        }
    }
}
