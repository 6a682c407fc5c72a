//! Compiled kernels on disk. An entry is named by what it was made of, written at once, and checked when it is read:
//! whatever is wrong with it costs one compilation.

use sha2::{Digest, Sha256};
use std::{
    io::Write,
    path::{Path, PathBuf},
};

/// First bytes of an entry; the digest of the cubin and the cubin follow.
const MAGIC: &[u8; 16] = b"ringback-cubin-1";
const HEAD: usize = MAGIC.len() + 32;

/// What an entry is named by.
pub(crate) fn key(source: &str, options: &[String], compiler: (i32, i32)) -> String {
    let mut digest = Sha256::new();
    for part in std::iter::once(source).chain(options.iter().map(String::as_str)) {
        // With its length: no two lists of parts are one text.
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    digest.update(compiler.0.to_le_bytes());
    digest.update(compiler.1.to_le_bytes());
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn path(folder: &Path, key: &str) -> PathBuf {
    folder.join(format!("{key}.cubin"))
}

/// The cubin of an entry, if there is a sound one.
pub(crate) fn read(folder: &Path, key: &str) -> Option<Vec<u8>> {
    let path = path(folder, key);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "a compiled kernel cannot be read; it is compiled again");
            return None;
        }
    };
    let sound = bytes.len() > HEAD
        && bytes.starts_with(MAGIC)
        && Sha256::digest(&bytes[HEAD..]).as_slice() == &bytes[MAGIC.len()..HEAD];
    if !sound {
        tracing::warn!(path = %path.display(), "a compiled kernel is damaged; it is compiled again");
        return None;
    }
    Some(bytes[HEAD..].to_vec())
}

/// Writes an entry, whole or not at all: beside its place, then renamed.
///
/// # Errors
/// If the folder cannot be made or written.
pub(crate) fn write(folder: &Path, key: &str, cubin: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(MAGIC)?;
    file.write_all(Sha256::digest(cubin).as_slice())?;
    file.write_all(cubin)?;
    file.as_file().sync_all()?;
    file.persist(path(folder, key))?;
    Ok(())
}

/// The entry, or what `make` gives, which is then kept. A folder that cannot be written costs a compilation at each
/// start and is told once.
pub(crate) fn get_or_make<E>(
    folder: Option<&Path>,
    key: &str,
    make: impl FnOnce() -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    if let Some(cubin) = folder.and_then(|folder| read(folder, key)) {
        return Ok(cubin);
    }
    let cubin = make()?;
    if let Some(folder) = folder
        && let Err(error) = write(folder, key, &cubin)
    {
        tracing::warn!(folder = %folder.display(), %error, "compiled kernels cannot be kept");
    }
    Ok(cubin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(folder: &Path, key: &str, with: &[u8]) -> (Vec<u8>, bool) {
        let mut asked = false;
        let cubin = get_or_make(Some(folder), key, || {
            asked = true;
            Ok::<_, ()>(with.to_vec())
        });
        (cubin.expect("nothing fails here"), asked)
    }

    #[test]
    fn a_kept_cubin_comes_back_and_a_damaged_one_is_made_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let inner = folder.path().join("kernels");
        assert_eq!(made(&inner, "k", b"machine code"), (b"machine code".to_vec(), true));
        assert_eq!(made(&inner, "k", b"not asked for"), (b"machine code".to_vec(), false));
        let file = path(&inner, "k");
        let whole = std::fs::read(&file).expect("the entry");
        let mut flipped = whole.clone();
        *flipped.last_mut().expect("a byte") ^= 1;
        for damaged in
            [&whole[..whole.len() - 1], &whole[..HEAD], b"", b"something else entirely", flipped.as_slice()]
        {
            std::fs::write(&file, damaged).expect("a damaged entry");
            assert_eq!(made(&inner, "k", b"again"), (b"again".to_vec(), true));
            assert_eq!(
                made(&inner, "k", b"not asked for"),
                (b"again".to_vec(), false),
                "the sound one was kept"
            );
        }
        let left: Vec<_> = std::fs::read_dir(&inner).expect("the folder").collect();
        assert_eq!(left.len(), 1, "no temporary file stays: {left:?}");
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_only_the_cache() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("a file");
        std::fs::write(&file, b"").expect("a file");
        assert_eq!(made(&file, "k", b"code"), (b"code".to_vec(), true));
    }

    #[test]
    fn the_key_tells_everything_apart_that_makes_another_cubin() {
        let options = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let keys = [
            key("source", &options(&["a", "b"]), (13, 5)),
            key("source2", &options(&["a", "b"]), (13, 5)),
            key("source", &options(&["a", "c"]), (13, 5)),
            key("source", &options(&["ab"]), (13, 5)),
            key("source", &options(&["a", "b"]), (13, 4)),
            key("source", &options(&["a", "b"]), (12, 5)),
        ];
        let different: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(different.len(), keys.len());
    }
}
