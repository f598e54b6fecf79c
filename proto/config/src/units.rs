//! Amounts with their unit in the text: byte sizes and intervals.
//!
//! A bare number is refused on purpose: `flush_interval = 1` reads as a second to one person and as
//! a millisecond to the next. Zero alone needs no unit.

use std::{fmt, str::FromStr, time::Duration};

/// Why a text is not an amount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// A number with nothing after it.
    #[error("`{text}` has no unit; write it as in {example}")]
    NoUnit {
        /// The text as given.
        text: String,
        /// A value that would be accepted.
        example: &'static str,
    },
    /// The unit is not one we know.
    #[error("`{unit}` is not a unit here; known are {known}")]
    UnknownUnit {
        /// The unit as given.
        unit: String,
        /// The accepted units.
        known: &'static str,
    },
    /// There is no number in front of the unit.
    #[error("`{text}` does not start with a number; write it as in {example}")]
    NoNumber {
        /// The text as given.
        text: String,
        /// A value that would be accepted.
        example: &'static str,
    },
    /// The amount does not fit.
    #[error("`{text}` is too large")]
    TooLarge {
        /// The text as given.
        text: String,
    },
}

/// A number of bytes, written as `64KiB`, `1MiB`, `2GiB` (powers of 1024; `kB`, `MB`, `GB` mean the
/// same as in PostgreSQL's own settings) or `512B`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

const SIZE_UNITS: &str = "B, KiB, MiB, GiB, TiB (kB, MB, GB and TB mean the same, as in PostgreSQL)";

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = split(text, "\"64MiB\"")?;
        let factor: u64 = match unit {
            "B" => 1,
            "KiB" | "kB" | "KB" | "K" | "k" => 1 << 10,
            "MiB" | "MB" | "M" => 1 << 20,
            "GiB" | "GB" | "G" => 1 << 30,
            "TiB" | "TB" | "T" => 1 << 40,
            "" if number == 0 => 1,
            "" => {
                return Err(UnitError::NoUnit {
                    text: text.to_owned(),
                    example: "\"64MiB\"",
                });
            }
            other => {
                return Err(UnitError::UnknownUnit {
                    unit: other.to_owned(),
                    known: SIZE_UNITS,
                });
            }
        };
        number
            .checked_mul(factor)
            .map(Self)
            .ok_or_else(|| UnitError::TooLarge {
                text: text.to_owned(),
            })
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}B", self.0)
    }
}

/// A length of time, written as `250ms`, `1s`, `5min`, `2h` or `7d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Interval(pub Duration);

const TIME_UNITS: &str = "ms, s, min, h, d";

impl FromStr for Interval {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = split(text, "\"1s\"")?;
        let millis: u64 = match unit {
            "ms" => 1,
            "s" | "sec" => 1_000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            "" if number == 0 => 1,
            "" => {
                return Err(UnitError::NoUnit {
                    text: text.to_owned(),
                    example: "\"1s\"",
                });
            }
            other => {
                return Err(UnitError::UnknownUnit {
                    unit: other.to_owned(),
                    known: TIME_UNITS,
                });
            }
        };
        number
            .checked_mul(millis)
            .map(|millis| Self(Duration::from_millis(millis)))
            .ok_or_else(|| UnitError::TooLarge {
                text: text.to_owned(),
            })
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        for (factor, unit) in [(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")] {
            if millis != 0 && millis.is_multiple_of(factor) {
                return write!(f, "{}{unit}", millis / factor);
            }
        }
        write!(f, "{millis}ms")
    }
}

/// The leading whole number and what follows it, without the blanks between.
fn split<'a>(text: &'a str, example: &'static str) -> Result<(u64, &'a str), UnitError> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(UnitError::NoNumber {
            text: text.to_owned(),
            example,
        });
    }
    let number = number.parse().map_err(|_| UnitError::TooLarge {
        text: text.to_owned(),
    })?;
    Ok((number, unit.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_printed_in_the_largest_whole_unit() {
        for (text, bytes, printed) in [
            ("512B", 512, "512B"),
            ("64 MB", 64 << 20, "64MiB"),
            ("1536KiB", 1536 << 10, "1536KiB"),
            ("0", 0, "0B"),
        ] {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!(size, ByteSize(bytes));
            assert_eq!(size.to_string(), printed);
            assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size);
        }
    }

    #[test]
    fn intervals_are_read_and_printed_in_the_largest_whole_unit() {
        for (text, millis, printed) in [
            ("250ms", 250, "250ms"),
            ("90s", 90_000, "90s"),
            ("120 s", 120_000, "2min"),
        ] {
            let interval: Interval = text.parse().unwrap();
            assert_eq!(interval.0, Duration::from_millis(millis));
            assert_eq!(interval.to_string(), printed);
        }
    }

    #[test]
    fn a_bare_number_is_refused_with_an_example() {
        let error = "5".parse::<Interval>().unwrap_err();
        assert_eq!(error.to_string(), "`5` has no unit; write it as in \"1s\"");
        assert!(matches!("5".parse::<ByteSize>(), Err(UnitError::NoUnit { .. })));
    }

    #[test]
    fn rubbish_is_refused() {
        assert!(matches!("".parse::<ByteSize>(), Err(UnitError::NoNumber { .. })));
        assert!(matches!(
            "-1s".parse::<Interval>(),
            Err(UnitError::NoNumber { .. })
        ));
        assert!(matches!(
            "1 fortnight".parse::<Interval>(),
            Err(UnitError::UnknownUnit { .. })
        ));
        assert!(matches!(
            "99999999999999999999s".parse::<Interval>(),
            Err(UnitError::TooLarge { .. })
        ));
        assert!(matches!(
            "18446744073709551615GiB".parse::<ByteSize>(),
            Err(UnitError::TooLarge { .. })
        ));
    }
}
