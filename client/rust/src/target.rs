//! Where a store is: the names that gRPC gives to servers (<https://github.com/grpc/grpc/blob/master/doc/naming.md>).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use crate::error::Error;

const USE: &str = "use host:port, dns:///host:port or unix:/path";

/// A store by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The path of a unix socket.
    Unix(PathBuf),
    /// Hosts and ports; the addresses of all are the store's.
    Hosts(Vec<(String, u16)>),
}

/// One address of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl Target {
    /// Reads `host:port`, `dns:///host:port`, `ipv4:` or `ipv6:` and addresses, or `unix:/path`.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let malformed = || Error::new(format!("target {text:?}: {USE}"));
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(malformed()) };
        }
        let addresses = ["ipv4:", "ipv6:"].iter().find_map(|scheme| text.strip_prefix(scheme));
        let names = addresses.or_else(|| text.strip_prefix("dns:///")).or_else(|| text.strip_prefix("dns:")).unwrap_or(text);
        let separator = if addresses.is_some() { "," } else { "\n" };
        let hosts = names.split(separator).map(|name| host(name, addresses.is_some()).ok_or_else(malformed));
        hosts.collect::<Result<_, _>>().map(Self::Hosts)
    }

    /// The store's name in requests and in its certificate.
    pub(crate) fn authority(&self) -> String {
        match self {
            Self::Hosts(hosts) if hosts[0].0.contains(':') => format!("[{}]:{}", hosts[0].0, hosts[0].1),
            Self::Hosts(hosts) => format!("{}:{}", hosts[0].0, hosts[0].1),
            Self::Unix(_) => "localhost".into(),
        }
    }

    /// Returns the addresses; None if a name has to be resolved.
    pub(crate) fn literal(&self) -> Option<Vec<Address>> {
        match self {
            Self::Unix(path) => Some(vec![Address::Unix(path.clone())]),
            Self::Hosts(hosts) => {
                let address = |(host, port): &(String, u16)| Some(Address::Tcp(SocketAddr::new(host.parse().ok()?, *port)));
                hosts.iter().map(address).collect()
            }
        }
    }

    /// Resolves the names.
    pub(crate) async fn resolve(&self) -> io::Result<Vec<Address>> {
        if let Some(literal) = self.literal() {
            return Ok(literal);
        }
        let mut found = Vec::new();
        if let Self::Hosts(hosts) = self {
            for (host, port) in hosts {
                for address in tokio::net::lookup_host((host.as_str(), *port)).await?.map(Address::Tcp) {
                    if !found.contains(&address) {
                        found.push(address);
                    }
                }
            }
        }
        Ok(found)
    }
}

fn host(name: &str, address: bool) -> Option<(String, u16)> {
    let (host, port) = name.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port > 0)?;
    let (host, bracketed) = match host.strip_prefix('[') {
        Some(rest) => (rest.strip_suffix(']')?, true),
        None => (host, false),
    };
    let number = host.parse::<IpAddr>();
    let fits = number.as_ref().map_or(!bracketed && !address, |number| number.is_ipv6() == bracketed);
    let legal = |byte: char| byte.is_alphanumeric() || "-._:".contains(byte);
    (fits && !host.is_empty() && host.chars().all(legal) && (bracketed || !host.contains(':'))).then(|| (host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_those_of_grpc() {
        let parsed = |text| Target::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let store = || Target::Hosts(vec![("store".into(), 7400)]);
        for text in ["store:7400", "dns:///store:7400", "dns:store:7400"] {
            assert_eq!((parsed(text), parsed(text).literal()), (store(), None));
        }
        for (text, authority) in [("127.0.0.1:7400", "127.0.0.1:7400"), ("ipv6:[::1]:7400", "[::1]:7400")] {
            assert_eq!(parsed(text).authority(), authority);
            assert_eq!(parsed(text).literal(), Some(vec![Address::Tcp(authority.parse().unwrap())]));
        }
        let several = parsed("ipv4:10.0.0.1:1,10.0.0.2:2").literal().unwrap();
        assert_eq!(several, ["10.0.0.1:1", "10.0.0.2:2"].map(|each| Address::Tcp(each.parse().unwrap())));
        for text in ["unix:/run/r.sock", "unix:///run/r.sock"] {
            assert_eq!(parsed(text), Target::Unix("/run/r.sock".into()));
        }
        for text in
            ["", "store", "http://store:7400", "store:0", "store:70000", ":7400", "unix:", "a b:1", "a:1,b:1", "::1:7400"]
        {
            let error = Target::parse(text).expect_err(text).to_string();
            assert!(error.contains("use host:port"), "{error}");
        }
        for text in ["ipv4:store:7400", "ipv4:1.1.1.1:1,", "[store]:1", "dns://8.8.8.8/store:7400", "user@store:7400"] {
            assert!(Target::parse(text).is_err(), "{text}");
        }
    }
}
