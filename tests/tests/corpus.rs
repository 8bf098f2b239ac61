//! The parsers that meet the network, held to the promises of the fuzz targets: on the corpus, which holds
//! what once broke them, and on damaged copies of it. docs/fuzzing.md lists them.

// A path and not a dependency: `fuzz` is a workspace of its own, for the nightly compiler.
#[path = "../../fuzz/src/lib.rs"]
mod targets;

use proptest::prelude::*;
use proptest::sample::Index;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use targets::{TARGETS, Target};
use throughline_tests::root;

fn files_of(target: &str) -> Vec<PathBuf> {
    let directory = root().join("fuzz/corpus").join(target);
    let files: Vec<PathBuf> = names_in(&directory).iter().map(|name| directory.join(name)).collect();
    assert!(!files.is_empty(), "{} is empty", directory.display());
    files
}

fn names_in(directory: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    entries.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn every_input_of_the_corpus_keeps_the_promises() {
    let mut broken = Vec::new();
    for (name, target) in TARGETS {
        for file in files_of(name) {
            let input = std::fs::read(&file).expect("readable");
            if std::panic::catch_unwind(|| target(&input)).is_err() {
                broken.push(file);
            }
        }
    }
    assert!(broken.is_empty(), "these break a promise, see above: {broken:#?}");
}

#[test]
fn targets_files_corpus_and_documentation_agree() {
    let names: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let files = names_in(&root().join("fuzz/fuzz_targets"));
    assert_eq!(files.iter().map(|f| f.trim_end_matches(".rs").to_owned()).collect::<BTreeSet<_>>(), names);
    assert_eq!(names_in(&root().join("fuzz/corpus")), names);
    let page = std::fs::read_to_string(root().join("docs/fuzzing.md")).expect("docs/fuzzing.md");
    let manifest = std::fs::read_to_string(root().join("fuzz/Cargo.toml")).expect("fuzz/Cargo.toml");
    for name in names {
        assert!(page.contains(&format!("`{name}`")), "docs/fuzzing.md lacks `{name}`");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "fuzz/Cargo.toml lacks `{name}`");
    }
}

/// What happens to an input at one place.
#[derive(Clone, Debug)]
enum Damage {
    Flip(u8),
    Insert(Vec<u8>),
    Remove(usize),
    /// What stands there, again and again: nesting, lists, long names.
    Repeat(usize, usize),
    /// The rest is another input's.
    Splice(Index),
}

fn damage() -> impl Strategy<Value = (Index, Damage)> {
    let kind = prop_oneof![
        any::<u8>().prop_map(Damage::Flip),
        prop::collection::vec(any::<u8>(), 1..9).prop_map(Damage::Insert),
        "[\\[\\]{}()\"'=.,:#\\n a-z0-9+\\-]{1,8}".prop_map(|text| Damage::Insert(text.into_bytes())),
        (1usize..40).prop_map(Damage::Remove),
        (1usize..12, 1usize..200).prop_map(|(len, times)| Damage::Repeat(len, times)),
        any::<Index>().prop_map(Damage::Splice),
    ];
    (any::<Index>(), kind)
}

fn damaged(files: &[PathBuf], which: Index, damages: &[(Index, Damage)]) -> Vec<u8> {
    let read = |which: &Index| std::fs::read(which.get(files)).expect("readable");
    let mut input = read(&which);
    for (at, kind) in damages {
        let at = at.index(input.len() + 1);
        let len_before = input.len();
        let end = |len: usize| (at + len).min(len_before);
        match kind {
            Damage::Flip(bits) => input.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= bits),
            Damage::Insert(bytes) => drop(input.splice(at..at, bytes.iter().copied())),
            Damage::Remove(len) => drop(input.drain(at..end(*len))),
            Damage::Repeat(len, times) => {
                let again = input[at..end(*len)].repeat(*times);
                input.splice(at..at, again);
            }
            Damage::Splice(other) => {
                let other = read(other);
                input.truncate(at);
                input.extend_from_slice(&other[at.min(other.len())..]);
            }
        }
    }
    input
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_inputs_keep_the_promises(
        (name, target) in prop::sample::select(TARGETS.to_vec()),
        which in any::<Index>(),
        damages in prop::collection::vec(damage(), 1..5),
    ) {
        let target: Target = target;
        let input = damaged(&files_of(name), which, &damages);
        let shown = String::from_utf8_lossy(&input).into_owned();
        let kept = std::panic::catch_unwind(|| target(&input));
        prop_assert!(kept.is_ok(), "{}: {:?}", name, shown);
    }
}
