//! [`Model`] to a Hugging Face folder: `config.json`, safetensors shards, and an index when there are several.
//!
//! Routed experts are written one by one under their published names; prediction modules repeat the embedding and the
//! head, as published checkpoints do. In FP8 the linear layers are E4M3 codes with `weight_scale_inv`; `eh_proj`,
//! embedding, head, norms and routers are BF16; router biases are F32 in every format. `reference/deepseek-v3.md` §1.3.
//!
//! Invariant: the files are a function of the weights, the format and the shard size; one shard is in memory at a time.

use std::collections::BTreeMap;
use std::io;

use dsv3_ops::{Fp8, Fp8Format, Fp8Scales, ParamId, Precision, Tensor, fp8::Encoding};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::load::{scale_name, scale_shape};
use crate::stored::{INDEX, SINGLE};
use crate::weight_names::Role;
use crate::{Error, HfConfig, Model, Quantization};

/// Element types of a saved model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveFormat {
    /// Everything F32: the masters, exactly.
    F32,
    /// Everything BF16.
    Bf16,
    /// Linear layers in block-scaled FP8 E4M3, the rest BF16.
    Fp8(Fp8Scales),
}

/// Where a tensor's values come from.
#[derive(Clone, Copy)]
enum Source {
    /// Expert `1` (or the whole) of parameter `0`.
    Param(ParamId, Option<usize>),
    /// Its FP8 codes.
    Codes(ParamId, Option<usize>),
    /// Its FP8 scales.
    Scales(ParamId, Option<usize>),
    /// A router bias.
    Bias(usize),
}

/// One tensor to write.
struct Item {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    source: Source,
}

impl Item {
    fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.bitsize() as u64 / 8
    }
}

/// Hands every file of the folder to `out` as (name, content). A shard holds at most `shard_bytes`, or one tensor.
///
/// # Errors
/// When `out` fails.
pub fn save(
    model: &Model,
    format: SaveFormat,
    shard_bytes: u64,
    out: &mut dyn FnMut(&str, Vec<u8>) -> io::Result<()>,
) -> Result<(), Error> {
    let mut write =
        |name: &str, bytes| out(name, bytes).map_err(|source| Error::Write { name: name.to_owned(), source });
    let shards = sharded(items(model, format), shard_bytes);
    let mut map = BTreeMap::new();
    let mut total = 0;
    for (i, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        for item in shard {
            total += item.bytes();
            map.insert(item.name.clone(), name.clone());
        }
        write(&name, encode(model, format, shard, &name)?)?;
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        write(INDEX, serde_json::to_vec_pretty(&index).unwrap_or_default())?;
    }
    write("config.json", config(model, format).to_json())
}

fn config(model: &Model, format: SaveFormat) -> HfConfig {
    let dtype = if format == SaveFormat::F32 { "float32" } else { "bfloat16" };
    let quantization = match format {
        SaveFormat::F32 | SaveFormat::Bf16 => None,
        SaveFormat::Fp8(scales) => Some(Quantization {
            quant_method: "fp8".to_owned(),
            fmt: "e4m3".to_owned(),
            activation_scheme: "dynamic".to_owned(),
            weight_block_size: vec![128, 128],
            scale_fmt: (scales == Fp8Scales::Ue8m0).then(|| "ue8m0".to_owned()),
        }),
    };
    HfConfig { model: model.config.clone(), dtype: Some(dtype.to_owned()), quantization }
}

/// Every tensor of the folder, parameters in table order.
fn items(model: &Model, format: SaveFormat) -> Vec<Item> {
    let plain = if format == SaveFormat::F32 { Dtype::F32 } else { Dtype::BF16 };
    let mut items = Vec::new();
    for info in model.infos() {
        let shape = info.tensor_shape().to_vec();
        for (expert, name) in info.tensor_names().into_iter().enumerate() {
            let part = info.is_stacked().then_some(expert);
            if matches!(format, SaveFormat::Fp8(_)) && info.role == Role::Linear {
                let (scales, source) = (scale_name(&name), Source::Scales(info.id, part));
                let codes = Source::Codes(info.id, part);
                items.push(Item { name, dtype: Dtype::F8_E4M3, shape: shape.clone(), source: codes });
                items.push(Item { name: scales, dtype: Dtype::F32, shape: scale_shape(&shape), source });
            } else {
                items.push(Item { name, dtype: plain, shape: shape.clone(), source: Source::Param(info.id, part) });
            }
        }
    }
    for (i, bias) in model.bias_infos().iter().enumerate() {
        let shape = vec![model.biases()[i].len()];
        items.push(Item { name: bias.name.clone(), dtype: Dtype::F32, shape, source: Source::Bias(i) });
    }
    for (name, id) in model.table.repeats(&model.config) {
        let shape = model.infos()[id as usize].shape.clone();
        items.push(Item { name, dtype: plain, shape, source: Source::Param(id, None) });
    }
    items
}

/// Consecutive tensors until a shard is full.
fn sharded(items: Vec<Item>, shard_bytes: u64) -> Vec<Vec<Item>> {
    let (mut shards, mut shard, mut filled) = (Vec::new(), Vec::new(), 0);
    for item in items {
        let bytes = item.bytes();
        if filled > 0 && filled + bytes > shard_bytes {
            shards.push(std::mem::take(&mut shard));
            filled = 0;
        }
        filled += bytes;
        shard.push(item);
    }
    shards.push(shard);
    shards
}

/// One file's content.
fn encode(model: &Model, format: SaveFormat, shard: &[Item], file: &str) -> Result<Vec<u8>, Error> {
    let mut converter = Converter { model, format, last: None };
    let data: Vec<Vec<u8>> = shard.iter().map(|item| converter.bytes(item)).collect();
    let refused = |error: safetensors::SafeTensorError| Error::Write {
        name: file.to_owned(),
        source: io::Error::other(error.to_string()),
    };
    let views = shard
        .iter()
        .zip(&data)
        .map(|(item, data)| Ok((&item.name, TensorView::new(item.dtype, item.shape.clone(), data).map_err(refused)?)))
        .collect::<Result<Vec<_>, Error>>()?;
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize(views, Some(metadata)).map_err(refused)
}

/// Keeps the parameter converted last, so that a stack of experts is converted once and not once per expert.
struct Converter<'a> {
    model: &'a Model,
    format: SaveFormat,
    last: Option<(ParamId, Values)>,
}

/// A whole parameter as it is written.
enum Values {
    F32(Tensor),
    Bf16(Tensor),
    Fp8 { codes: Tensor, scales: Tensor },
}

impl Converter<'_> {
    fn bytes(&mut self, item: &Item) -> Vec<u8> {
        let (id, expert) = match item.source {
            Source::Bias(index) => return little_endian(&self.model.biases()[index]),
            Source::Param(id, expert) | Source::Codes(id, expert) | Source::Scales(id, expert) => (id, expert),
        };
        let len = item.shape.iter().product::<usize>();
        let range = expert.unwrap_or(0) * len..(expert.unwrap_or(0) + 1) * len;
        match (self.values(id), item.source) {
            (Values::F32(values), _) => little_endian(&values.as_f32()[range]),
            (Values::Bf16(values), _) => values.as_bf16()[range].iter().flat_map(|v| v.to_le_bytes()).collect(),
            (Values::Fp8 { scales, .. }, Source::Scales(..)) => little_endian(&scales.as_f32()[range]),
            (Values::Fp8 { codes, .. }, _) => codes.as_u8()[range].to_vec(),
        }
    }

    fn values(&mut self, id: ParamId) -> &Values {
        let (model, format) = (self.model, self.format);
        let slot = self.last.take().filter(|(last, _)| *last == id);
        let (_, values) = self.last.insert(slot.unwrap_or_else(|| (id, converted(model, format, id))));
        values
    }
}

fn converted(model: &Model, format: SaveFormat, id: ParamId) -> Values {
    let (info, param) = (&model.infos()[id as usize], &model.params()[id as usize]);
    let master = || param.master.clone().unwrap_or_else(|| param.compute.dequantize());
    match format {
        SaveFormat::F32 => Values::F32(master()),
        SaveFormat::Fp8(scales) if info.role == Role::Linear => {
            let untrained = Precision::Fp8 { format: Fp8Format::E4m3, scales };
            // Codes that were loaded are written as they were: encoding them again could move a scale by a rounding.
            let loaded = param.compute.fp8_parts().filter(|_| param.master.is_none());
            if let Some((codes, scales)) = loaded.filter(|_| param.compute.precision() == untrained) {
                return Values::Fp8 { codes, scales };
            }
            let Fp8 { codes, scales, .. } = Fp8::quantize_blocks(&master(), Encoding::E4m3, scales);
            Values::Fp8 { codes, scales }
        }
        SaveFormat::Bf16 | SaveFormat::Fp8(_) => Values::Bf16(master().to_bf16()),
    }
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
