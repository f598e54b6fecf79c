//! Bodies, and the headers that describe them.

use aws_sdk_s3::primitives::{ByteStream, ByteStreamError};
use aws_smithy_types::base64;
use bytes::{Bytes, BytesMut};

/// Reserved at once for a body whose announced length has not been seen to be true.
const MAX_RESERVE: u64 = 64 << 20;

/// Reads a body of `expected` bytes, and stops soon after when there are more.
pub(super) async fn collect(mut body: ByteStream, expected: u64) -> Result<Bytes, ByteStreamError> {
    let mut first: Option<Bytes> = None;
    let mut all = BytesMut::new();
    while let Some(chunk) = body.try_next().await? {
        match first.take() {
            // Small objects arrive in one piece and are not copied.
            None if all.is_empty() => first = Some(chunk),
            None => all.extend_from_slice(&chunk),
            Some(head) => {
                all.reserve(
                    usize::try_from(expected.min(MAX_RESERVE))
                        .unwrap_or(0)
                        .max(head.len() + chunk.len()),
                );
                all.extend_from_slice(&head);
                all.extend_from_slice(&chunk);
            }
        }
        if all.len() as u64 > expected {
            break;
        }
    }
    Ok(first.unwrap_or_else(|| all.freeze()))
}

/// The value of `x-amz-checksum-crc32`: the four bytes, big endian, in base64.
pub(super) fn crc32_to_base64(crc32: u32) -> String {
    base64::encode(crc32.to_be_bytes())
}

/// Back from the header; `None` for the composite checksums of multipart uploads (`…==-2`).
pub(super) fn crc32_of_base64(text: &str) -> Option<u32> {
    let bytes = base64::decode(text).ok()?;
    bytes.try_into().ok().map(u32::from_be_bytes)
}

/// `bytes 0-99/1000` as start, end (exclusive) and size.
pub(super) fn parse_content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, last) = range.split_once('-')?;
    let (start, last, size): (u64, u64, u64) = (start.parse().ok()?, last.parse().ok()?, size.parse().ok()?);
    let end = last.checked_add(1)?;
    (start < end && end <= size).then_some((start, end, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_travel_big_endian() {
        // CRC-32 of "123456789", from the catalogue of parametrised CRC algorithms.
        assert_eq!(crc32fast::hash(b"123456789"), 0xCBF4_3926);
        assert_eq!(crc32_to_base64(0xCBF4_3926), "y/Q5Jg==");
        assert_eq!(crc32_of_base64("y/Q5Jg=="), Some(0xCBF4_3926));
        assert_eq!(crc32_of_base64("y/Q5Jg==-2"), None);
        assert_eq!(crc32_of_base64(""), None);
    }

    #[test]
    fn content_ranges_are_read_strictly() {
        assert_eq!(parse_content_range("bytes 0-99/1000"), Some((0, 100, 1000)));
        for bad in [
            "",
            "bytes */1000",
            "bytes 5-4/10",
            "bytes 0-10/10",
            "bytes 0-18446744073709551615/5",
            "0-1/2",
        ] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn a_body_longer_than_announced_is_not_read_to_its_end() {
        let bytes = collect(ByteStream::from_static(b"0123456789"), 4).await.unwrap();
        assert_eq!(bytes.len(), 10);
    }
}
