//! `model.safetensors.index.json`: which file holds which tensor.
//!
//! Refused: a tensor that is placed twice, and file names that are not names in the index's own directory.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Error, MapAccess, Visitor};

/// The file of every tensor, by name.
///
/// # Errors
/// One line saying what is wrong, without the index's name.
pub fn parse_index(json: &[u8]) -> Result<BTreeMap<String, String>, String> {
    let Index { weight_map: Some(WeightMap(placed)) } =
        serde_json::from_slice(json).map_err(|error| format!("not a valid index: {error}"))?
    else {
        return Err("lacks a weight_map".to_owned());
    };
    if placed.is_empty() {
        return Err("weight_map is empty".to_owned());
    }
    for (tensor, file) in &placed {
        if matches!(file.as_str(), "" | "." | "..") || file.contains(['/', '\\', '\0']) {
            return Err(format!("places tensor {tensor} in {file:?}, which is not a file of this directory"));
        }
    }
    Ok(placed)
}

/// Only what is needed of the index; it also has a `metadata`, which nothing relies on.
#[derive(Deserialize)]
struct Index {
    weight_map: Option<WeightMap>,
}

struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor;

        impl<'de> Visitor<'de> for MapVisitor {
            type Value = WeightMap;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut placed = BTreeMap::new();
                while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                    if placed.contains_key(&tensor) {
                        return Err(A::Error::custom(format!("tensor {tensor} is placed twice")));
                    }
                    placed.insert(tensor, file);
                }
                Ok(WeightMap(placed))
            }
        }

        deserializer.deserialize_map(MapVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_read_and_bad_ones_are_refused() {
        let placed = parse_index(br#"{"metadata": {"total_size": 1}, "weight_map": {"b": "x", "a": "y"}}"#).unwrap();
        assert_eq!(placed, BTreeMap::from([("a".into(), "y".into()), ("b".into(), "x".into())]));
        for (json, reason) in [
            ("{", "not a valid index: EOF"),
            ("[]", "not a valid index: "),
            ("{}", "lacks a weight_map"),
            (r#"{"weight_map": {}}"#, "weight_map is empty"),
            (r#"{"weight_map": []}"#, "expected an object of file names"),
            (r#"{"weight_map": {"a": 1}}"#, "invalid type: integer"),
            (r#"{"weight_map": {"a": "x", "a": "x"}}"#, "tensor a is placed twice"),
            (r#"{"weight_map": {"a": "../x"}}"#, r#"places tensor a in "../x", which is not a file of this directory"#),
            (r#"{"weight_map": {"a": "/etc/passwd"}}"#, "not a file of this directory"),
            (r#"{"weight_map": {"a": ".."}}"#, "not a file of this directory"),
            (r#"{"weight_map": {"a": "x\u0000"}}"#, "not a file of this directory"),
        ] {
            let found = parse_index(json.as_bytes()).unwrap_err();
            assert!(found.contains(reason), "{json}: found {found:?}, expected {reason:?}");
        }
    }
}
