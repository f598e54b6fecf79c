//! `FORMAT.md` is the norm: its examples are regenerated here and compared with the document.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use highwater_format::*;

use crate::samples;

fn document() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("FORMAT.md")).unwrap()
}

/// The lines between a fence that opens with `info` and its end.
fn block(info: &str) -> String {
    let document = document();
    let fence = format!("```{info}\n");
    let (_, rest) = document
        .split_once(&fence)
        .unwrap_or_else(|| panic!("FORMAT.md has no block {info:?}"));
    rest.split_once("```").unwrap().0.to_owned()
}

/// Sixteen bytes a line: offset, hexadecimal, printable characters.
fn dump(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (index, line) in bytes.chunks(16).enumerate() {
        let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let text: String = line
            .iter()
            .map(|&byte| {
                if matches!(byte, 0x20..0x7F) {
                    char::from(byte)
                } else {
                    '.'
                }
            })
            .collect();
        let line = format!("{:04x}  {:<47}  {text}", index * 16, hex.join(" "));
        // Editors take blanks at the end of a line away.
        writeln!(out, "{}", line.trim_end()).unwrap();
    }
    out
}

fn undump(text: &str) -> Vec<u8> {
    let hex = text.lines().flat_map(|line| line[6..53].split_whitespace());
    hex.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

fn compare(info: &str, expected: &str) {
    let found = block(info);
    assert!(
        found == expected,
        "block {info:?} of FORMAT.md should be\n{expected}\nbut is\n{found}"
    );
}

#[test]
fn the_example_object_is_what_seal_writes() {
    compare("hex object", &dump(&samples::example(Codec::None).bytes()));
}

/// Compared by decoding: the next release of a compressor may choose other bytes.
#[test]
fn the_compressed_examples_decode_to_the_same_bytes() {
    for codec in [Codec::Lz4, Codec::Zstd] {
        let info = format!("hex object-{codec}");
        let object = Object::open(undump(&block(&info)).into()).unwrap_or_else(|error| {
            panic!(
                "{error}; block {info:?} could be\n{}",
                dump(&samples::example(codec).bytes())
            )
        });
        let sample = samples::example(codec);
        assert_eq!(object.plain().unwrap(), sample.plain());
        assert_eq!(object.header(), &sample.seal().header);
    }
}

#[test]
fn the_example_documents_are_what_encode_writes() {
    for (name, bytes) in samples::documents() {
        compare(
            &format!("json {name}"),
            &format!("{}\n", String::from_utf8(bytes).unwrap()),
        );
    }
}

#[test]
fn the_example_keys_are_what_the_layout_writes() {
    let list: String = samples::keys()
        .iter()
        .map(|(_, key)| format!("{key}\n"))
        .collect();
    compare("keys", &list);
}

#[test]
fn the_example_history_is_read() {
    let history = History::parse(samples::timeline(3), block("history").as_bytes()).unwrap();
    assert_eq!(
        history,
        History::parse(samples::timeline(3), samples::HISTORY).unwrap()
    );
}
