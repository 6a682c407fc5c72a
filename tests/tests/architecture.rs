//! The walls between the crates (DESIGN 10), checked on the manifests: arrows point down, every crate inherits the
//! lints, and one crate dials URLs from outside.

use ringback_test_support::tools::root;
use std::collections::{BTreeMap, BTreeSet};
use toml::{Table, Value};

/// Layers from below; a crate may use crates of lower layers, and of its own layer only where [`SIDEWAYS`] says so.
const LAYERS: [(&str, &[&str]); 5] = [
    ("pure", &["domain", "inference"]),
    ("wire", &["contracts"]),
    (
        "adapters",
        &[
            "service-runtime",
            "bus",
            "store",
            "store-migrations",
            "egress",
            "webhook-receiver",
            "worker-protocol",
            "inference-cuda",
        ],
    ),
    ("services", &["api-ingest", "state-tracker", "gpu-worker", "webhook-dispatcher", "reconciler"]),
    ("program", &["ringback"]),
];

/// Arrows inside a layer: the runtime is beneath the other adapters, the schema beneath the store.
const SIDEWAYS: &[(&str, &str)] = &[
    ("bus", "service-runtime"),
    ("store", "service-runtime"),
    ("egress", "service-runtime"),
    ("webhook-receiver", "egress"),
    ("webhook-receiver", "service-runtime"),
    ("worker-protocol", "service-runtime"),
    ("store", "store-migrations"),
];

/// Who may name the HTTP client: the crate that guards it, the command line (the operator's own requests) and tests.
const HTTP_CLIENT: [&str; 3] = ["egress", "ringback", "test-support"];

/// The only crate with unsafe code, and the lints that it has instead: the workspace's, but for unsafe code, which is
/// allowed where a comment says why it is sound.
const UNSAFE: &str = "inference-cuda";

struct Manifest {
    name: String,
    table: Table,
}

fn manifests() -> Vec<Manifest> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(root().join("crates")).expect("crates/") {
        let folder = entry.expect("an entry").path();
        let text = std::fs::read_to_string(folder.join("Cargo.toml")).expect("a manifest");
        all.push(Manifest {
            name: folder.file_name().expect("a name").to_string_lossy().into_owned(),
            table: text.parse().expect("TOML"),
        });
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|(_, crates)| crates.contains(&name))
}

fn names(table: &Table, section: &str) -> BTreeSet<String> {
    table
        .get(section)
        .and_then(Value::as_table)
        .map(|deps| deps.keys().cloned().collect())
        .unwrap_or_default()
}

/// Our own crates among the dependencies of a section, by folder name.
fn ours(table: &Table, section: &str) -> BTreeSet<String> {
    names(table, section)
        .into_iter()
        .filter_map(|name| {
            if name == "ringback" { Some(name) } else { Some(name.strip_prefix("ringback-")?.to_owned()) }
        })
        .collect()
}

#[test]
fn arrows_point_down() {
    for manifest in manifests() {
        let used: BTreeSet<String> = ours(&manifest.table, "dependencies")
            .union(&ours(&manifest.table, "build-dependencies"))
            .cloned()
            .collect();
        if manifest.name == "test-support" {
            assert!(
                used.is_empty(),
                "the harness looks from outside, it uses no crate of the product: {used:?}"
            );
            continue;
        }
        let own = layer(&manifest.name)
            .unwrap_or_else(|| panic!("{} is in no layer: add it to LAYERS", manifest.name));
        for other in used {
            let below = layer(&other)
                .unwrap_or_else(|| panic!("{} uses {other}, which is for tests only", manifest.name));
            let sideways = below == own && SIDEWAYS.contains(&(manifest.name.as_str(), other.as_str()));
            assert!(
                below < own || sideways,
                "{} ({}) must not use {other} ({})",
                manifest.name,
                LAYERS[own].0,
                LAYERS[below].0
            );
        }
    }
}

#[test]
fn every_layer_is_complete() {
    let there: BTreeSet<String> = manifests().into_iter().map(|manifest| manifest.name).collect();
    for (layer, crates) in LAYERS {
        for name in crates {
            assert!(there.contains(*name), "{name} of layer {layer} does not exist");
        }
    }
}

#[test]
fn every_crate_inherits_the_lints() {
    let tests: BTreeMap<String, Table> = ["examples/receiver-axum", "tests", "tests/bench"]
        .into_iter()
        .map(|folder| {
            let text = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).expect("a manifest");
            (folder.to_owned(), text.parse().expect("TOML"))
        })
        .collect();
    let crates = manifests().into_iter().map(|manifest| (manifest.name, manifest.table));
    for (name, table) in crates.chain(tests) {
        let inherits = table.get("lints").and_then(|lints| lints.get("workspace")).and_then(Value::as_bool);
        if name == UNSAFE {
            own_lints_are_as_strict(&table);
        } else {
            assert_eq!(inherits, Some(true), "{name} lacks [lints] workspace = true");
        }
        let package = table["package"].as_table().expect("[package]");
        for key in ["version", "edition", "license", "publish"] {
            let value = package.get(key).unwrap_or_else(|| panic!("{name} lacks {key}"));
            assert_eq!(value.get("workspace"), Some(&Value::Boolean(true)), "{name}: {key}.workspace = true");
        }
    }
    let workspace: Table =
        std::fs::read_to_string(root().join("Cargo.toml")).expect("the workspace").parse().expect("TOML");
    assert_eq!(workspace["workspace"]["lints"]["rust"]["unsafe_code"].as_str(), Some("forbid"));
}

/// Cargo lets a crate inherit all lints or none, so [`UNSAFE`] writes them down again.
fn own_lints_are_as_strict(table: &Table) {
    let workspace: Table =
        std::fs::read_to_string(root().join("Cargo.toml")).expect("the workspace").parse().expect("TOML");
    for (tool, lints) in workspace["workspace"]["lints"].as_table().expect("[workspace.lints]") {
        for (lint, level) in lints.as_table().expect("lints of a tool") {
            let own = table["lints"].get(tool).and_then(|lints| lints.get(lint));
            let wanted = if lint == "unsafe_code" { Value::from("allow") } else { level.clone() };
            assert_eq!(own, Some(&wanted), "{UNSAFE}: lints.{tool}.{lint}");
        }
    }
    assert_eq!(table["lints"]["clippy"]["undocumented_unsafe_blocks"].as_str(), Some("deny"));
    assert_eq!(table["lints"]["rust"]["unsafe_op_in_unsafe_fn"].as_str(), Some("deny"));
}

/// A worker takes jobs and talks to the tracker: it may run where no database can be reached (DESIGN 7).
#[test]
fn workers_have_no_database() {
    let all = manifests();
    let of = |name: &str| all.iter().find(|manifest| manifest.name == name).expect("a crate of ours");
    let (mut used, mut next) = (BTreeSet::new(), vec!["gpu-worker".to_owned()]);
    while let Some(name) = next.pop() {
        for section in ["dependencies", "build-dependencies"] {
            next.extend(
                ours(&of(&name).table, section).into_iter().filter(|other| used.insert(other.clone())),
            );
        }
    }
    assert!(used.contains("bus"), "{used:?}");
    for name in ["store", "store-migrations"] {
        assert!(!used.contains(name), "gpu-worker reaches {name}");
    }
}

/// Every version of a dependency is written once, in the workspace.
#[test]
fn versions_are_written_once() {
    for manifest in manifests() {
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(table) = manifest.table.get(section).and_then(Value::as_table) else { continue };
            for (name, value) in table {
                let inherited = value.get("workspace").and_then(Value::as_bool) == Some(true);
                assert!(inherited, "{}: {section}.{name} must be {{ workspace = true }}", manifest.name);
            }
        }
    }
}

#[test]
fn one_crate_dials_urls_from_outside() {
    for manifest in manifests() {
        if !HTTP_CLIENT.contains(&manifest.name.as_str()) {
            assert!(
                !names(&manifest.table, "dependencies").contains("reqwest"),
                "{} names reqwest: only egress may dial what came from outside",
                manifest.name
            );
        }
        let egress = ours(&manifest.table, "dependencies").contains("egress");
        assert!(
            !egress
                || ["webhook-dispatcher", "webhook-receiver", "api-ingest", "gpu-worker", "ringback"]
                    .contains(&manifest.name.as_str()),
            "{} has no business outside",
            manifest.name
        );
    }
}

#[test]
fn the_harness_is_for_tests_only() {
    for manifest in manifests() {
        assert!(
            !ours(&manifest.table, "dependencies").contains("test-support"),
            "{} ships the test harness",
            manifest.name
        );
    }
}
