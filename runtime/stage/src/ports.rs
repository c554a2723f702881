//! Typed ports: a struct of artifacts, declared once, from which come the specification, the reader and the writer.

use dsv3_core::{Artifact, ArtifactRef, Error, Kind};
use serde_json::{Map, Value};

/// What the engine knows of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// Name in pipelines.
    pub name: &'static str,
    /// [`Kind::NAME`] of what it takes.
    pub kind: &'static str,
    /// [`Kind::ABOUT`] of what it takes.
    pub kind_about: &'static str,
    /// Whether it must be connected.
    pub required: bool,
    /// Whether it takes several artifacts.
    pub many: bool,
    /// What it is for.
    pub doc: &'static str,
}

/// A struct of ports; write it with [`crate::ports!`].
pub trait Ports: Sized + Send + 'static {
    /// The ports in their order.
    fn specs() -> Vec<PortSpec>;

    /// Reads `{port: {kind, digest} | [..]}`.
    ///
    /// # Errors
    /// Names the port that is missing, unknown or of another kind.
    fn from_json(value: &Value) -> Result<Self, Error>;

    /// Writes what [`Ports::from_json`] reads.
    fn to_json(&self) -> Value;
}

/// A field of a struct of ports: one artifact, an optional one, or many.
pub trait PortField: Sized {
    /// Its specification.
    fn spec(name: &'static str, doc: &'static str) -> PortSpec;

    /// Reads it.
    ///
    /// # Errors
    /// Names the port.
    fn read(name: &str, value: Option<&Value>) -> Result<Self, Error>;

    /// Writes it; none when it is not connected.
    fn write(&self) -> Option<Value>;
}

fn one<K: Kind>(name: &str, value: &Value) -> Result<Artifact<K>, Error> {
    let reference: ArtifactRef = serde_json::from_value(value.clone())
        .map_err(|source| Error::invalid(format!("port {name} holds no artifact")).source(source))?;
    if reference.kind != K::NAME {
        let found = reference.kind;
        return Err(Error::invalid(format!("port {name} takes an artifact of kind {}, this one is {found}", K::NAME)));
    }
    Ok(Artifact::new(reference.digest))
}

fn json<K: Kind>(artifact: &Artifact<K>) -> Value {
    let ArtifactRef { kind, digest } = artifact.erase();
    serde_json::json!({ "kind": kind, "digest": digest.to_string() })
}

impl<K: Kind> PortField for Artifact<K> {
    fn spec(name: &'static str, doc: &'static str) -> PortSpec {
        PortSpec { name, kind: K::NAME, kind_about: K::ABOUT, required: true, many: false, doc }
    }

    fn read(name: &str, value: Option<&Value>) -> Result<Self, Error> {
        one(name, value.ok_or_else(|| Error::invalid(format!("port {name} is not connected")))?)
    }

    fn write(&self) -> Option<Value> {
        Some(json(self))
    }
}

impl<K: Kind> PortField for Option<Artifact<K>> {
    fn spec(name: &'static str, doc: &'static str) -> PortSpec {
        PortSpec { required: false, ..Artifact::<K>::spec(name, doc) }
    }

    fn read(name: &str, value: Option<&Value>) -> Result<Self, Error> {
        value.filter(|value| !value.is_null()).map(|value| one(name, value)).transpose()
    }

    fn write(&self) -> Option<Value> {
        self.as_ref().map(json)
    }
}

impl<K: Kind> PortField for Vec<Artifact<K>> {
    fn spec(name: &'static str, doc: &'static str) -> PortSpec {
        PortSpec { required: false, many: true, ..Artifact::<K>::spec(name, doc) }
    }

    fn read(name: &str, value: Option<&Value>) -> Result<Self, Error> {
        match value {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(items)) => items.iter().map(|item| one(name, item)).collect(),
            Some(item) => Ok(vec![one(name, item)?]),
        }
    }

    fn write(&self) -> Option<Value> {
        Some(self.iter().map(json).collect())
    }
}

/// No ports at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPorts {}

impl Ports for NoPorts {
    fn specs() -> Vec<PortSpec> {
        Vec::new()
    }

    fn from_json(value: &Value) -> Result<Self, Error> {
        refuse_unknown(value, &[]).map(|()| Self {})
    }

    fn to_json(&self) -> Value {
        Value::Object(Map::new())
    }
}

/// Refuses ports that are not declared.
#[doc(hidden)]
pub fn refuse_unknown(value: &Value, names: &[&str]) -> Result<(), Error> {
    let map = value.as_object().ok_or_else(|| Error::internal("ports are not a JSON object"))?;
    match map.keys().find(|key| !names.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => Err(Error::invalid(format!("there is no port {key}; there are: {}", names.join(", ")))),
    }
}

/// What the macro's code refers to.
#[doc(hidden)]
pub mod private {
    pub use super::refuse_unknown;
    pub use dsv3_core::Error;
    pub use serde_json::{Map, Value};
}

/// Declares a struct of ports. Each field is `Artifact<K>`, `Option<Artifact<K>>` or `Vec<Artifact<K>>` and carries a doc
/// comment, which becomes the port's description.
///
/// ```
/// use dsv3_stage::{Artifact, Ports, kinds::{Documents, Tokenizer}, ports};
/// ports! {
///     /// Inputs of `ingest`.
///     pub struct Inputs {
///         /// Text to read.
///         documents: Artifact<Documents>,
///         /// A tokenizer to use instead of training one.
///         tokenizer: Option<Artifact<Tokenizer>>,
///     }
/// }
/// assert_eq!(Inputs::specs()[1].kind, "tokenizer");
/// ```
#[macro_export]
macro_rules! ports {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $( $(#[doc = $doc:literal])* $fvis:vis $field:ident : $type:ty ),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Debug)]
        $vis struct $name {
            $( $(#[doc = $doc])* pub $field: $type, )*
        }

        impl $crate::Ports for $name {
            fn specs() -> Vec<$crate::PortSpec> {
                vec![$( <$type as $crate::PortField>::spec(stringify!($field), concat!($($doc),*).trim_ascii()) ),*]
            }

            fn from_json(value: &$crate::private::Value) -> Result<Self, $crate::private::Error> {
                $crate::private::refuse_unknown(value, &[$(stringify!($field)),*])?;
                Ok(Self { $( $field: <$type as $crate::PortField>::read(stringify!($field), value.get(stringify!($field)))?, )* })
            }

            fn to_json(&self) -> $crate::private::Value {
                let mut map = $crate::private::Map::new();
                $( if let Some(value) = $crate::PortField::write(&self.$field) {
                    map.insert(stringify!($field).to_owned(), value);
                } )*
                $crate::private::Value::Object(map)
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use dsv3_core::{Digest, kinds};

    use super::*;

    ports! {
        /// Ports of the tests.
        pub(crate) struct Three {
            /// One of
            /// them.
            tokens: Artifact<kinds::Tokens>,
            /// Perhaps.
            tokenizer: Option<Artifact<kinds::Tokenizer>>,
            /// Some.
            chats: Vec<Artifact<kinds::Chat>>,
        }
    }

    #[test]
    fn ports_round_trip_and_describe_themselves() {
        let digest = Digest::of(b"x");
        let ports = Three { tokens: Artifact::new(digest), tokenizer: None, chats: vec![Artifact::new(digest); 2] };
        let again = Three::from_json(&ports.to_json()).unwrap();
        assert_eq!(again.to_json(), ports.to_json());
        assert_eq!((again.chats.len(), again.tokenizer.is_none()), (2, true));
        let specs = Three::specs();
        assert_eq!(specs[0].doc, "One of them.");
        assert_eq!(
            specs.iter().map(|s| (s.required, s.many)).collect::<Vec<_>>(),
            [(true, false), (false, false), (false, true)]
        );
    }

    #[test]
    fn a_wrong_kind_a_missing_and_an_unknown_port_are_named() {
        let reference = |kind: &str| serde_json::json!({"kind": kind, "digest": Digest::of(b"x").to_string()});
        let error = |value: Value| Three::from_json(&value).unwrap_err().to_string();
        assert!(
            error(serde_json::json!({"tokens": reference("chat")}))
                .contains("takes an artifact of kind tokens, this one is chat")
        );
        assert!(error(serde_json::json!({})).contains("port tokens is not connected"));
        assert!(error(serde_json::json!({"tokens": reference("tokens"), "extra": 1})).contains("no port extra"));
    }
}
