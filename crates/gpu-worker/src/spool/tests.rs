use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::*;

fn replay(folder: &Path) -> BTreeMap<u64, Vec<u8>> {
    let (_, found) = Spool::open_with(folder, 200).expect("opens");
    found.into_iter().map(|one| (one.id, one.payload)).collect()
}

fn segments(folder: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(folder).expect("folder").map(|e| e.expect("entry").path()).collect();
    all.sort();
    all
}

#[test]
fn what_is_not_done_comes_back_and_ids_go_on() {
    let folder = tempfile::tempdir().expect("folder");
    let (mut spool, found) = Spool::open(folder.path()).expect("opens");
    assert!(found.is_empty());
    spool.append(1, b"one").expect("append");
    spool.append(2, b"two").expect("append");
    spool.done(1).expect("done");
    spool.sync().expect("sync");
    drop(spool);
    let (spool, found) = Spool::open(folder.path()).expect("opens");
    assert_eq!(found, [Replayed { id: 2, payload: b"two".to_vec() }]);
    assert_eq!(spool.next_id(), 3);
    assert_eq!(spool.depth(), 1);
}

#[test]
fn finished_segments_are_removed() {
    let folder = tempfile::tempdir().expect("folder");
    let (mut spool, _) = Spool::open_with(folder.path(), 200).expect("opens");
    for id in 1..=50 {
        spool.append(id, &[7; 50]).expect("append");
    }
    assert!(segments(folder.path()).len() > 5);
    for id in 1..=50 {
        spool.done(id).expect("done");
    }
    assert!(segments(folder.path()).len() <= 2, "{:?}", segments(folder.path()));
    drop(spool);
    assert!(replay(folder.path()).is_empty());
}

#[test]
fn a_long_series_of_short_lives_does_not_grow() {
    let folder = tempfile::tempdir().expect("folder");
    let (mut spool, _) = Spool::open_with(folder.path(), 500).expect("opens");
    for id in 1..=1000 {
        spool.append(id, &[7; 50]).expect("append");
        spool.done(id).expect("done");
    }
    assert!(spool.bytes() <= 1500, "{}", spool.bytes());
}

#[test]
fn a_torn_end_loses_only_the_unfinished_record() {
    let folder = tempfile::tempdir().expect("folder");
    let (mut spool, _) = Spool::open(folder.path()).expect("opens");
    spool.append(1, b"whole").expect("append");
    spool.append(2, b"torn").expect("append");
    drop(spool);
    let path = segments(folder.path()).pop().expect("segment");
    let bytes = fs::read(&path).expect("read");
    fs::write(&path, &bytes[..bytes.len() - 1]).expect("write");
    assert_eq!(replay(folder.path()), BTreeMap::from([(1, b"whole".to_vec())]));
}

#[test]
fn a_damaged_record_in_the_middle_is_skipped() {
    let folder = tempfile::tempdir().expect("folder");
    let (mut spool, _) = Spool::open(folder.path()).expect("opens");
    for (id, text) in [(1, "first"), (2, "second"), (3, "third")] {
        spool.append(id, text.as_bytes()).expect("append");
    }
    drop(spool);
    let path = segments(folder.path()).pop().expect("segment");
    let mut bytes = fs::read(&path).expect("read");
    let at = bytes.windows(6).position(|part| part == b"second").expect("second");
    bytes[at] ^= 1;
    fs::write(&path, &bytes).expect("write");
    assert_eq!(read_segment(&path).expect("read").skipped, 1);
    let left = replay(folder.path());
    assert_eq!(left, BTreeMap::from([(1, b"first".to_vec()), (3, b"third".to_vec())]));
}

#[test]
fn the_writer_skips_what_is_done_and_keeps_the_rest() {
    let folder = tempfile::tempdir().expect("folder");
    let (spool, _) = Spool::open(folder.path()).expect("opens");
    let writer = SpoolWriter::start(spool, 1024).expect("starts");
    for id in 1..=100 {
        writer.append(id, vec![7; 100]);
        if id % 2 == 0 {
            writer.done(id);
        }
    }
    assert!(writer.is_full());
    drop(writer);
    let left = replay(folder.path());
    assert_eq!(left.len(), 50);
    assert!(left.keys().all(|id| id % 2 == 1));
}

#[derive(Clone, Debug)]
enum Step {
    Append(Vec<u8>),
    Done(prop::sample::Index),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => proptest::collection::vec(any::<u8>(), 0..80).prop_map(Step::Append),
        2 => any::<prop::sample::Index>().prop_map(Step::Done),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn always_holds_exactly_what_is_not_done(steps in steps()) {
        let folder = tempfile::tempdir().expect("folder");
        let (mut spool, _) = Spool::open_with(folder.path(), 200).expect("opens");
        let mut model: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Append(payload) => {
                    let id = spool.next_id();
                    spool.append(id, &payload).expect("append");
                    model.insert(id, payload);
                }
                Step::Done(index) => {
                    if let Some(&id) = (!model.is_empty()).then(|| index.get(&model.keys().copied().collect::<Vec<_>>()).to_owned()).as_ref() {
                        spool.done(id).expect("done");
                        model.remove(&id);
                    }
                }
                Step::Reopen => {
                    drop(spool);
                    let (again, found) = Spool::open_with(folder.path(), 200).expect("opens");
                    let found: BTreeMap<u64, Vec<u8>> = found.into_iter().map(|one| (one.id, one.payload)).collect();
                    prop_assert_eq!(&found, &model);
                    spool = again;
                }
            }
        }
        drop(spool);
        prop_assert_eq!(replay(folder.path()), model);
    }
}
