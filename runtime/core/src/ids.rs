//! Names of runs: ULIDs, so that they sort by the time they began.

/// The ULID of a moment and 80 random bits (the low bits of `random`), both from the caller.
pub fn run_id(unix_millis: u64, random: u128) -> String {
    ulid::Ulid::from_parts(unix_millis, random).to_string().to_lowercase()
}
