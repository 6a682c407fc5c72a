//! One definition per configuration section: fields, defaults and documentation cannot drift apart.

/// One documented key of a section.
#[derive(Debug, Clone, Copy)]
pub struct FieldDoc {
    /// The key as written in the file.
    pub key: &'static str,
    /// Meaning and unit, the field's own documentation.
    pub doc: &'static str,
}

/// A section whose keys can be listed with their documentation.
pub trait Section {
    /// What the section is about.
    const ABOUT: &'static str;
    /// Every key, in file order.
    const FIELDS: &'static [FieldDoc];
}

/// Defines a section struct: serde with defaults, unknown keys refused, every key documented.
macro_rules! section {
    (
        $(#[doc = $about:literal])*
        $name:ident {
            $( $(#[doc = $doc:literal])* $field:ident : $ty:ty = $default:expr ),* $(,)?
        }
    ) => {
        $(#[doc = $about])*
        #[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $( $(#[doc = $doc])* pub $field: $ty, )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: $default, )* }
            }
        }

        impl $crate::config::section::Section for $name {
            const ABOUT: &'static str = concat!($($about),*);
            const FIELDS: &'static [$crate::config::section::FieldDoc] = &[
                $( $crate::config::section::FieldDoc {
                    key: stringify!($field),
                    doc: concat!($($doc),*),
                }, )*
            ];
        }
    };
}
pub(crate) use section;
