//! Turns every file in `topics/` into a typed handle, so that a topic name is spelled in one place only.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../../topics");
    let root = root.canonicalize().unwrap_or(root);
    println!("cargo::rerun-if-changed={}", root.display());
    let mut handles = String::new();
    let mut topic_files = String::new();
    let mut schema_files = String::new();
    for path in sorted_files(&root) {
        println!("cargo::rerun-if-changed={}", path.display());
        let file = path.file_name().and_then(|n| n.to_str()).expect("file names are UTF-8").to_owned();
        let include = format!("include_str!({:?})", path.display().to_string());
        match path.extension().and_then(|e| e.to_str()) {
            Some("toml") => {
                let name = topic_name(&path);
                let constant = name.replace("3rd_party", "third_party").replace('.', "_").to_uppercase();
                writeln!(handles, "/// The topic `{name}`, declared in `topics/{file}`.\npub const {constant}: &str = {name:?};").expect("writing to a string");
                writeln!(topic_files, "    ({file:?}, {include}),").expect("writing to a string");
            }
            Some("avsc") => {
                writeln!(schema_files, "    ({file:?}, {include}),").expect("writing to a string")
            }
            _ => {}
        }
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("topics.rs");
    let text = format!(
        "{handles}\n/// The topic files of this build: file name and text.\npub const TOPIC_FILES: &[(&str, &str)] = &[\n{topic_files}];\n\n/// The Avro schemas of this build: file name and text.\npub const SCHEMA_FILES: &[(&str, &str)] = &[\n{schema_files}];\n"
    );
    fs::write(out, text).expect("OUT_DIR is writable");
}

fn sorted_files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect())
        .unwrap_or_default();
    files.sort();
    files
}

fn topic_name(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("topic files are readable");
    let table: toml::Table = text.parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    table
        .get("name")
        .and_then(|n| n.as_str())
        .unwrap_or_else(|| panic!("{}: `name` is missing", path.display()))
        .to_owned()
}
