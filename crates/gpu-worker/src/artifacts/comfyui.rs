//! Jobs in the form `workflow`, `download_urls`, `upload_urls`: what they name is fetched before they start, and their
//! outputs are put where they say.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use ringback_domain::artifact::file_name;
use ringback_egress::Client;
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;

use super::files::{Pieces, StoreFileError};
use super::keep::{Item, failure, pieces_of, vanished};
use super::{Keeper, Work};
use crate::executor::End;

const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Default, Deserialize)]
struct Input {
    #[serde(default)]
    download_urls: Option<Urls>,
    #[serde(default)]
    upload_urls: Option<Urls>,
}

/// URLs as clients write them: a list of texts, a list of objects, or an object by file name.
#[derive(Deserialize)]
#[serde(untagged)]
enum Urls {
    ByName(BTreeMap<String, String>),
    List(Vec<OneUrl>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneUrl {
    Plain(String),
    Named {
        url: String,
        #[serde(alias = "name", alias = "file_name", alias = "path")]
        filename: Option<String>,
    },
}

impl Urls {
    /// URL and, where told, name.
    fn all(self) -> Vec<(String, Option<String>)> {
        match self {
            Self::ByName(map) => map.into_iter().map(|(name, url)| (url, Some(name))).collect(),
            Self::List(list) => list
                .into_iter()
                .map(|one| match one {
                    OneUrl::Plain(url) => (url, None),
                    OneUrl::Named { url, filename } => (url, filename),
                })
                .collect(),
        }
    }
}

/// The last segment of a URL's path, undone from its percent signs where that is UTF-8.
fn name_in(url: &str) -> String {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let last = path.rsplit('/').next().unwrap_or_default();
    let mut bytes = Vec::with_capacity(last.len());
    let mut rest = last.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let hex = (byte == b'%').then(|| after.get(..2)).flatten().and_then(|h| std::str::from_utf8(h).ok());
        match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
            Some(decoded) => {
                bytes.push(decoded);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    file_name(&String::from_utf8_lossy(&bytes))
}

fn read(input: &[u8]) -> Result<Input, String> {
    // Another kind of input names nothing.
    if !input.trim_ascii_start().starts_with(b"{") {
        return Ok(Input::default());
    }
    serde_json::from_slice(input).map_err(|_| {
        "`download_urls` and `upload_urls` must be lists of URLs, lists of {url, filename}, or objects from file name to URL"
            .to_owned()
    })
}

/// Fetches every file that the input names into the endpoint's input folder.
pub(super) async fn fetch_inputs(keeper: &Keeper, input: &Bytes) -> Result<(), String> {
    let Some(urls) = read(input)?.download_urls.map(Urls::all) else { return Ok(()) };
    let (Some(client), Some(outbox)) = (&keeper.egress, &keeper.outbox) else { return Ok(()) };
    let max_files = keeper.config.max_files as usize;
    if urls.len() > max_files {
        return Err(format!(
            "`download_urls` names {} files; artifacts.max_files is {max_files}",
            urls.len()
        ));
    }
    let folder = outbox.cwd.join(&keeper.config.input_folder);
    tokio::fs::create_dir_all(&folder)
        .await
        .map_err(|error| format!("the folder for `download_urls` cannot be made: {error}"))?;
    for (n, (url, name)) in urls.into_iter().enumerate() {
        let name = name.map_or_else(|| name_in(&url), |name| file_name(&name));
        let began = std::time::Instant::now();
        let bytes = download(keeper, client, &url, &folder, &name)
            .await
            .map_err(|error| format!("`download_urls[{n}]` ({name}): {error}"))?;
        tracing::info!(
            endpoint = keeper.endpoint,
            name,
            bytes,
            ms = began.elapsed().as_millis(),
            "input file fetched"
        );
    }
    Ok(())
}

async fn download(
    keeper: &Keeper,
    client: &Client,
    url: &str,
    folder: &Path,
    name: &str,
) -> Result<u64, String> {
    let mut last = String::new();
    for n in 0..TRIES {
        if n > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        let checked = client.check(url).map_err(|error| error.to_string())?;
        match download_once(keeper, client, checked, folder, name).await {
            Ok(bytes) => return Ok(bytes),
            Err((error, true)) => last = error,
            Err((error, false)) => return Err(error),
        }
    }
    Err(last)
}

/// The flag tells whether trying again may help.
async fn download_once(
    keeper: &Keeper,
    client: &Client,
    url: ringback_egress::CheckedUrl,
    folder: &Path,
    name: &str,
) -> Result<u64, (String, bool)> {
    let time = Duration::from_millis(keeper.config.transfer_timeout_ms);
    let max_bytes = keeper.config.max_bytes;
    let again = |error: ringback_egress::EgressError| {
        let again = !matches!(
            error,
            ringback_egress::EgressError::TooLarge(_) | ringback_egress::EgressError::Blocked(_)
        );
        (error.to_string(), again)
    };
    let disk = |error: std::io::Error| (format!("cannot be written: {error}"), false);
    let mut download = client.download(url, time, max_bytes).await.map_err(again)?;
    if download.status() != 200 {
        let status = download.status();
        return Err((format!("the server answered {status}"), status >= 500 || status == 429));
    }
    // Whole or not at all: a handler must not find a part.
    let part = folder.join(format!(".{:016x}.part", rand::random::<u64>()));
    let written = async {
        let mut file = tokio::fs::File::create_new(&part).await.map_err(disk)?;
        let mut bytes = 0;
        while let Some(piece) = download.chunk().await.map_err(again)? {
            bytes += piece.len() as u64;
            file.write_all(&piece).await.map_err(disk)?;
        }
        file.flush().await.map_err(disk)?;
        tokio::fs::rename(&part, folder.join(name)).await.map_err(disk)?;
        Ok(bytes)
    }
    .await;
    if written.is_err() {
        let _ = tokio::fs::remove_file(&part).await;
    }
    written
}

/// Where outputs go.
pub(super) struct Uploads {
    urls: Vec<(String, Option<String>)>,
}

impl Uploads {
    pub(super) fn of(keeper: &Keeper, input: &Bytes) -> Result<Self, String> {
        let urls = if keeper.config.comfyui { read(input)?.upload_urls.map(Urls::all) } else { None };
        Ok(Self { urls: urls.unwrap_or_default() })
    }

    /// The URL for an output: the one told for its name, else the next of those without a name.
    pub(super) fn url_for(&self, name: &str, used: usize) -> Option<&str> {
        let by_name =
            self.urls.iter().find(|(_, told)| told.as_deref().is_some_and(|told| file_name(told) == name));
        let in_order = || self.urls.get(used).filter(|(_, told)| told.is_none());
        by_name.or_else(in_order).map(|(url, _)| url.as_str())
    }

    /// PUTs a file; answers its URL without what was signed for the PUT.
    pub(super) async fn put(
        &self,
        keeper: &Keeper,
        work: &Work,
        item: &Item,
        url: &str,
    ) -> Result<String, End> {
        let failed = |error: String| {
            failure("UploadFailed", format!("the file {} was not uploaded: {error}", item.name))
        };
        let Some(client) = &keeper.egress else { return Err(failed("uploads are off".to_owned())) };
        let time = Duration::from_millis(keeper.config.transfer_timeout_ms);
        let mut last = String::new();
        for n in 0..TRIES {
            if n > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            let checked = client.check(url).map_err(|error| failed(error.to_string()))?;
            let pieces = pieces_of(keeper, work, item).await.ok_or_else(vanished)?;
            let length = pieces.length().map_err(|error| failed(error.to_string()))?;
            if length > keeper.config.max_bytes {
                let max = keeper.config.max_bytes;
                return Err(failed(format!("it has {length} bytes; artifacts.max_bytes is {max}")));
            }
            let began = std::time::Instant::now();
            match client.upload(checked, &item.content_type, length, stream(pieces), time).await {
                Ok(200..=299) => {
                    let ms = began.elapsed().as_millis();
                    tracing::info!(job_id = %work.key.job, name = item.name, bytes = length, ms, "output uploaded");
                    return Ok(url.split(['?', '#']).next().unwrap_or_default().to_owned());
                }
                Ok(status) => {
                    last = format!("the server answered {status}");
                    if status < 500 && status != 429 {
                        break;
                    }
                }
                Err(error) => last = error.to_string(),
            }
        }
        Err(failed(last))
    }
}

fn stream(pieces: Pieces) -> impl futures::Stream<Item = Result<Bytes, StoreFileError>> + Send + 'static {
    futures::stream::try_unfold(pieces, async |pieces| {
        let (piece, rest) = pieces.next().await?;
        Ok::<_, StoreFileError>((!piece.is_empty()).then_some((piece, rest)))
    })
}

/// The output with its uploaded images listed as `images`, where it does not list them itself.
pub(super) fn list_images(output: Vec<u8>, images: &[String]) -> Vec<u8> {
    #[derive(Deserialize)]
    struct Listed {
        images: Option<serde::de::IgnoredAny>,
    }
    let list = format!("\"images\":[{}]", images.join(","));
    let text = output.trim_ascii();
    match serde_json::from_slice::<Listed>(text) {
        Ok(Listed { images: None }) if text.ends_with(b"}") => {
            let inside = text.get(1..text.len() - 1).unwrap_or_default().trim_ascii();
            let comma = if inside.is_empty() { "" } else { "," };
            [b"{".as_slice(), inside, comma.as_bytes(), list.as_bytes(), b"}"].concat()
        }
        _ => output,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_as_clients_write_them() {
        let read = |text: &str| super::read(text.as_bytes()).map(|i| i.download_urls.map(Urls::all));
        assert_eq!(
            read(
                r#"{"workflow":{},"download_urls":["https://a/x.png?sig=1",{"url":"https://b","name":"y"}]}"#
            )
            .unwrap()
            .unwrap(),
            [("https://a/x.png?sig=1".to_owned(), None), ("https://b".to_owned(), Some("y".to_owned()))]
        );
        let by_name = read(r#"{"download_urls":{"m.bin":"https://a"}}"#).unwrap().unwrap();
        assert_eq!(by_name, [("https://a".to_owned(), Some("m.bin".to_owned()))]);
        assert!(read("[1]").unwrap().is_none() && read("{}").unwrap().is_none());
        assert!(read(r#"{"download_urls":7}"#).unwrap_err().contains("download_urls"));
        assert_eq!(name_in("https://a/b/my%20cat%2Fx.png?sig=a/b"), "x.png");
        assert_eq!(name_in("https://a/"), "file");
    }

    #[test]
    fn outputs_go_to_their_name_or_in_order() {
        let uploads = Uploads {
            urls: vec![
                ("https://a/1".to_owned(), None),
                ("https://a/2".to_owned(), None),
                ("https://a/n".to_owned(), Some("named.png".to_owned())),
            ],
        };
        assert_eq!(uploads.url_for("x.png", 0), Some("https://a/1"));
        assert_eq!(uploads.url_for("y.png", 1), Some("https://a/2"));
        assert_eq!(uploads.url_for("named.png", 0), Some("https://a/n"));
        assert_eq!(uploads.url_for("z.png", 2), None);
    }

    #[test]
    fn images_are_listed_once() {
        let images = ["{\"filename\":\"a\"}".to_owned()];
        let listed = |output: &str| String::from_utf8(list_images(output.into(), &images)).unwrap();
        assert_eq!(listed(r#"{"n":1e400}"#), r#"{"n":1e400,"images":[{"filename":"a"}]}"#);
        assert_eq!(listed("{ }"), r#"{"images":[{"filename":"a"}]}"#);
        assert_eq!(listed(r#"{"images":[1]}"#), r#"{"images":[1]}"#);
        assert_eq!(listed("[1]"), "[1]");
    }
}
