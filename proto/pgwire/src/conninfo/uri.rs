//! The URI form of a connection string.
//!
//! `postgresql://[user[:password]@][host[:port]][,...][/dbname][?keyword=value[&...]]`, every part
//! percent-encoded. A socket directory is written as a percent-encoded host or as `?host=/dir`.

use crate::error::PgError;

const SCHEMES: [&str; 2] = ["postgresql://", "postgres://"];

/// The text after the scheme, if this is a URI.
pub(super) fn strip_scheme(text: &str) -> Option<&str> {
    SCHEMES.iter().find_map(|scheme| text.strip_prefix(scheme))
}

/// Splits a URI, without its scheme, into keyword and value pairs.
pub(super) fn parse(text: &str) -> Result<Vec<(String, String)>, PgError> {
    // As libpq: an @ before the first slash ends user and password, whatever they contain.
    let (userinfo, text) = match text.split('/').next().and_then(|head| head.split_once('@')) {
        Some((userinfo, _)) => (Some(userinfo), &text[userinfo.len() + 1..]),
        None => (None, text),
    };
    let (text, query) = match text.split_once('?') {
        Some((text, query)) => (text, Some(query)),
        None => (text, None),
    };
    let (hosts, dbname) = match text.split_once('/') {
        Some((hosts, dbname)) => (hosts, Some(dbname)),
        None => (text, None),
    };
    let mut pairs = Vec::new();
    if let Some(userinfo) = userinfo {
        let (user, password) = match userinfo.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (userinfo, None),
        };
        push(&mut pairs, "user", user)?;
        push(&mut pairs, "password", password.unwrap_or_default())?;
    }
    push_hosts(&mut pairs, hosts)?;
    push(&mut pairs, "dbname", dbname.unwrap_or_default())?;
    let parameters = query.unwrap_or_default().split('&');
    for (item, number) in parameters.zip(1..).filter(|(item, _)| !item.is_empty()) {
        push_parameter(&mut pairs, item, number)?;
    }
    Ok(pairs)
}

fn push(pairs: &mut Vec<(String, String)>, name: &str, encoded: &str) -> Result<(), PgError> {
    if !encoded.is_empty() {
        pairs.push((name.to_owned(), decode(name, encoded)?));
    }
    Ok(())
}

fn push_hosts(pairs: &mut Vec<(String, String)>, text: &str) -> Result<(), PgError> {
    let mut hosts = Vec::new();
    let mut ports = Vec::new();
    for item in text.split(',') {
        let (host, port) = split_port(item)?;
        let (host, port) = (decode("host", host)?, decode("port", port)?);
        // Neither is repeated: it may be a part of a password.
        if host.contains('@') || !port.bytes().all(|digit| digit.is_ascii_digit()) {
            return Err(PgError::config(
                "a host of the URI contains \"@\", or its port is not a number",
                "in user and password write / as %2F, ? as %3F, @ as %40, : as %3A",
            ));
        }
        hosts.push(host);
        ports.push(port);
    }
    let mut push_list = |name: &str, list: Vec<String>| {
        if list.iter().any(|item| !item.is_empty()) {
            pairs.push((name.to_owned(), list.join(",")));
        }
    };
    push_list("host", hosts);
    push_list("port", ports);
    Ok(())
}

/// `host:port`, `host`, `[::1]:port`, `[::1]`.
fn split_port(item: &str) -> Result<(&str, &str), PgError> {
    if let Some(rest) = item.strip_prefix('[') {
        let Some((address, after)) = rest.split_once(']') else {
            return Err(PgError::config(
                "an IPv6 address in the URI has no \"]\"",
                "write [address]:port",
            ));
        };
        return match (after, after.strip_prefix(':')) {
            ("", _) => Ok((address, "")),
            (_, Some(port)) => Ok((address, port)),
            _ => Err(PgError::config(
                "unexpected text after \"]\" in the URI",
                "write [address]:port",
            )),
        };
    }
    Ok(item.split_once(':').unwrap_or((item, "")))
}

fn push_parameter(pairs: &mut Vec<(String, String)>, item: &str, number: usize) -> Result<(), PgError> {
    let Some((name, value)) = item.split_once('=') else {
        return Err(PgError::config(
            format!("parameter {number} of the URI has no \"=\""),
            "write ?keyword=value&keyword=value",
        ));
    };
    let name = decode("parameter name", name)?;
    let value = decode(&name, value)?;
    // As libpq: what JDBC calls ssl.
    if name == "ssl" && value == "true" {
        pairs.push(("sslmode".to_owned(), "require".to_owned()));
    } else {
        pairs.push((name, value));
    }
    Ok(())
}

/// Percent-decodes; what is wrong is named without repeating the text, which may be a password.
fn decode(name: &str, text: &str) -> Result<String, PgError> {
    let bad = |what: &str| {
        Err(PgError::config(
            format!("{name} in the URI {what}"),
            "write special characters as % and two hexadecimal digits",
        ))
    };
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return bad("has an incomplete % escape");
        };
        match u8::try_from(high * 16 + low) {
            Ok(0) | Err(_) => return bad("contains %00"),
            Ok(byte) => bytes.push(byte),
        }
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(_) => bad("is not valid UTF-8"),
    }
}
