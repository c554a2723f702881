//! The flat batch layout of the WIT package: one blob of bytes and offsets, mirrored as component types.

use wasmtime::component::{ComponentType, Lift, Lower};

/// `texts` as the host passes it: item `i` is `data[offsets[i]..offsets[i + 1]]`.
#[derive(ComponentType, Lower, Clone)]
#[component(record)]
pub(crate) struct Texts {
    data: Vec<u8>,
    offsets: Vec<u32>,
}

impl Texts {
    /// Packs `items`; `None` when they exceed the 4 GiB that offsets can address.
    pub(crate) fn pack<'a>(items: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let mut texts = Self { data: Vec::new(), offsets: vec![0] };
        for item in items {
            texts.data.extend_from_slice(item.as_bytes());
            texts.offsets.push(u32::try_from(texts.data.len()).ok()?);
        }
        Some(texts)
    }
}

/// `texts` as the guest returns it; nothing in it is trusted.
#[derive(ComponentType, Lift)]
#[component(record)]
pub(crate) struct GuestTexts {
    data: Vec<u8>,
    offsets: Vec<u32>,
}

impl GuestTexts {
    /// Item `i` of `count`, or what is wrong with the layout.
    pub(crate) fn get(&self, i: usize, count: usize) -> Result<&str, String> {
        if self.offsets.len() != count + 1 {
            return Err(format!("{} offsets for {count} items, {} expected", self.offsets.len(), count + 1));
        }
        let (start, end) = (self.offsets[i] as usize, self.offsets[i + 1] as usize);
        let bytes = self.data.get(start..end).ok_or_else(|| {
            format!("offsets {start}..{end} of item {i} lie outside its {} bytes or run backwards", self.data.len())
        })?;
        std::str::from_utf8(bytes).map_err(|error| format!("text of item {i} is not UTF-8: {error}"))
    }
}

/// `filter.verdicts`.
#[derive(ComponentType, Lift)]
#[component(record)]
pub(crate) struct GuestVerdicts {
    pub(crate) actions: Vec<u8>,
    pub(crate) notes: GuestTexts,
}

/// `rewards.items`.
#[derive(ComponentType, Lower, Clone)]
#[component(record)]
pub(crate) struct Items {
    pub(crate) prompts: Texts,
    pub(crate) completions: Texts,
    pub(crate) answers: Texts,
    pub(crate) metadata: Texts,
    pub(crate) finished: Vec<u8>,
}

/// `rewards.scores`.
#[derive(ComponentType, Lift)]
#[component(record)]
pub(crate) struct GuestScores {
    pub(crate) totals: Vec<f64>,
    #[component(name = "part-names")]
    pub(crate) part_names: Vec<String>,
    pub(crate) parts: Vec<f64>,
}
