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
    let (text, query) = match text.split_once('?') {
        Some((text, query)) => (text, Some(query)),
        None => (text, None),
    };
    let (authority, dbname) = match text.split_once('/') {
        Some((authority, dbname)) => (authority, Some(dbname)),
        None => (text, None),
    };
    let (userinfo, hosts) = match authority.rsplit_once('@') {
        Some((userinfo, hosts)) => (Some(userinfo), hosts),
        None => (None, authority),
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
    for item in query
        .unwrap_or_default()
        .split('&')
        .filter(|item| !item.is_empty())
    {
        push_parameter(&mut pairs, item)?;
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
        hosts.push(decode("host", host)?);
        ports.push(decode("port", port)?);
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

fn push_parameter(pairs: &mut Vec<(String, String)>, item: &str) -> Result<(), PgError> {
    let Some((name, value)) = item.split_once('=') else {
        return Err(PgError::config(
            format!("URI parameter {item:?} has no \"=\""),
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
