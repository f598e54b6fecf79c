//! One way to serialise the types whose stored form is their text.

/// Implements serde through `Display` and `FromStr`, so that JSON shows what an operator would type.
macro_rules! serde_as_text {
    ($type:ty) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

pub(crate) use serde_as_text;

/// Reads exactly `width` upper-case hexadecimal digits, the only form that keys and WAL names use.
pub(crate) fn fixed_hex(text: &str, width: usize) -> Option<u64> {
    let canonical = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
    if text.len() != width || width > 16 || !text.bytes().all(canonical) {
        return None;
    }
    u64::from_str_radix(text, 16).ok()
}
