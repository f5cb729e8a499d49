//! The settings, from the environment of the process at its start: nginx clears its environment later.

use std::collections::HashMap;
use std::path::Path;
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

use resumed::Settings;

const PREFIX: &str = "RESUMED_";
const DEFAULT_MIRROR: &str = "64MiB";

pub struct Environment(HashMap<String, String>);

impl Environment {
    /// Returns the environment of the first call.
    pub fn remembered() -> &'static Self {
        static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
        ENVIRONMENT.get_or_init(|| {
            let variables =
                std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
            Self(variables.filter(|(name, _)| name.starts_with(PREFIX)).collect())
        })
    }

    /// Returns the namespace of contexts that request client certificates.
    pub fn verified_namespace(&self) -> Option<&str> {
        self.get("VERIFIED_NAMESPACE")
    }

    /// Returns the file that messages are appended to, instead of standard error.
    pub fn log(&self) -> Option<&Path> {
        self.get("LOG").map(Path::new)
    }

    /// Returns whether sessions resume in spite of unlike session id contexts.
    pub fn ignores_id_context(&self) -> Result<bool, String> {
        self.flag("IGNORE_ID_CONTEXT")
    }

    /// Returns the settings, or the error.
    pub fn settings(&self) -> Result<Settings, String> {
        let required = |name| self.get(name).map(str::to_owned).ok_or_else(|| format!("{PREFIX}{name} is not set"));
        let identity = match (self.get("CERT"), self.get("KEY")) {
            (Some(cert), Some(key)) => Some((cert.into(), key.into())),
            (None, None) => None,
            _ => return Err(format!("{PREFIX}CERT and {PREFIX}KEY go together: set both, or neither")),
        };
        let deadline = self.number("DEADLINE", 0.05)?;
        Ok(Settings {
            target: required("TARGET")?,
            namespace: required("NAMESPACE")?,
            keyring: required("KEYRING")?.into(),
            lifetime: Duration::from_secs(self.number("LIFETIME", 0)?),
            deadline: deadline_of(deadline).ok_or_else(|| self.outside("DEADLINE", "seconds, 0.001 to 60"))?,
            max_lookups: self.number("MAX_LOOKUPS", 0)?,
            mirror: size(self.get("MIRROR").unwrap_or(DEFAULT_MIRROR))
                .ok_or_else(|| self.outside("MIRROR", "a size such as 64MiB, or 0 for none"))?,
            single_use: self.flag("SINGLE_USE")?,
            any_ids: self.choice("IDS", "sealed", "any")?,
            wait_for_puts: self.choice("PUTS", "background", "wait")?,
            tls: self.flag("TLS")? || self.get("CA").is_some() || identity.is_some(),
            ca: self.get("CA").map(Into::into),
            identity,
            server_name: self.get("SERVER_NAME").map(str::to_owned),
            tickets: self.choice("SESSIONS", "stored", "tickets")?,
            tickets_tls12: self.flag("TICKETS_TLS12")?,
            rotation: Duration::from_secs(self.number("ROTATION", 0)?),
            revocation_grace: match self.get("REVOCATION_GRACE") {
                Some(_) => Some(Duration::from_secs(self.number("REVOCATION_GRACE", 0)?)),
                None => None,
            },
        })
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(&format!("{PREFIX}{name}")).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn number<T: FromStr>(&self, name: &str, default: T) -> Result<T, String> {
        self.get(name).map_or(Ok(default), |value| value.parse().map_err(|_| self.outside(name, "a number")))
    }

    fn flag(&self, name: &str) -> Result<bool, String> {
        self.choice(name, "0", "1")
    }

    /// Returns whether a setting is the other of two values; unset means the usual one.
    fn choice(&self, name: &str, usual: &str, other: &str) -> Result<bool, String> {
        match self.get(name) {
            Some(value) if value == other => Ok(true),
            None => Ok(false),
            Some(value) if value == usual => Ok(false),
            Some(_) => Err(self.outside(name, &format!("{usual} or {other}"))),
        }
    }

    fn outside(&self, name: &str, expected: &str) -> String {
        format!("{PREFIX}{name} must be {expected}, not {:?}", self.get(name).unwrap_or_default())
    }
}

fn deadline_of(seconds: f64) -> Option<Duration> {
    (0.001..=60.0).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

fn size(text: &str) -> Option<usize> {
    let digits = text.trim_end_matches(|character: char| !character.is_ascii_digit());
    let shift = match text[digits.len()..].trim() {
        "" | "B" => 0,
        "KiB" | "Ki" => 10,
        "MiB" | "Mi" => 20,
        "GiB" | "Gi" => 30,
        _ => return None,
    };
    digits.parse::<usize>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        let required = [("TARGET", "store:7400"), ("NAMESPACE", "shop"), ("KEYRING", "fleet.keys")];
        let all = required.iter().chain(variables);
        Environment(all.map(|(name, value)| (format!("{PREFIX}{name}"), (*value).to_owned())).collect())
    }

    #[test]
    fn an_unset_variable_has_its_default() {
        let settings = environment(&[]).settings().unwrap();
        assert_eq!(
            (settings.mirror, settings.deadline, settings.single_use, settings.tls),
            (64 << 20, Duration::from_millis(50), false, false)
        );
        let settings =
            environment(&[("MIRROR", "0"), ("DEADLINE", "0.2"), ("SINGLE_USE", "1"), ("CA", "ca.pem")]).settings().unwrap();
        assert_eq!(
            (settings.mirror, settings.deadline, settings.single_use, settings.tls),
            (0, Duration::from_millis(200), true, true)
        );
    }

    #[test]
    fn an_error_names_the_variable() {
        for (name, value) in [
            ("TARGET", ""),
            ("NAMESPACE", ""),
            ("KEYRING", ""),
            ("DEADLINE", "50ms"),
            ("DEADLINE", "0"),
            ("DEADLINE", "NaN"),
            ("LIFETIME", "-1"),
            ("MAX_LOOKUPS", "many"),
            ("MIRROR", "64MB"),
            ("MIRROR", "99999999999GiB"),
            ("SINGLE_USE", "yes"),
            ("IDS", "all"),
            ("PUTS", "later"),
            ("SESSIONS", "both"),
            ("TICKETS_TLS12", "true"),
            ("ROTATION", "1h"),
            ("REVOCATION_GRACE", "never"),
            ("CERT", "cert.pem"),
        ] {
            let error = environment(&[(name, value)]).settings().unwrap_err();
            assert!(error.starts_with(&format!("{PREFIX}{name}")), "{name}={value}: {error}");
        }
        assert!(environment(&[("IGNORE_ID_CONTEXT", "yes")]).ignores_id_context().is_err());
    }
}
