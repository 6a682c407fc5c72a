//! What stands in the output where a file was.

use serde_json::{Value, json};

/// In which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Ours.
    Native,
    /// An image in the form of RunPod's ComfyUI worker, which its clients read.
    ComfyUi,
    /// An image that was put where the client wanted it.
    Uploaded,
}

/// A file as the output shows it.
#[derive(Clone, Debug)]
pub struct Shown<'a> {
    /// Its link.
    pub url: &'a str,
    /// Its name.
    pub filename: &'a str,
    /// Its type.
    pub content_type: &'a str,
    /// Its size.
    pub size_bytes: u64,
    /// Hex of its SHA-256.
    pub sha256: &'a str,
    /// Whether its receiver confirmed it, where that was asked for.
    pub confirmed: Option<bool>,
}

/// The JSON that replaces a value.
#[must_use]
pub fn render(shape: Shape, file: &Shown<'_>) -> Value {
    let mut value = match shape {
        Shape::Native => json!({
            "url": file.url,
            "filename": file.filename,
            "content_type": file.content_type,
            "size_bytes": file.size_bytes,
            "sha256": file.sha256,
        }),
        Shape::ComfyUi => json!({
            "filename": file.filename,
            "type": "s3_url",
            "data": file.url,
            "size_bytes": file.size_bytes,
            "sha256": file.sha256,
        }),
        Shape::Uploaded => json!({"filename": file.filename, "type": "uploaded", "url": file.url}),
    };
    if let (Some(confirmed), Some(members)) = (file.confirmed, value.as_object_mut()) {
        members.insert("confirmed".to_owned(), confirmed.into());
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uploaded_image_is_told_as_its_clients_read_it() {
        let file = Shown {
            url: "https://b.test/a.png",
            filename: "a.png",
            content_type: "image/png",
            size_bytes: 3,
            sha256: "00",
            confirmed: None,
        };
        let expected = json!({"filename": "a.png", "type": "uploaded", "url": "https://b.test/a.png"});
        assert_eq!(render(Shape::Uploaded, &file), expected);
        assert_eq!(render(Shape::ComfyUi, &file)["data"], "https://b.test/a.png");
        let waited = Shown { confirmed: Some(false), ..file };
        assert_eq!(render(Shape::Native, &waited)["confirmed"], false);
    }
}
