//! Hugging Face folder to [`Model`]: F32, BF16, or FP8 E4M3 with `weight_scale_inv` (f32 per block of 128 × 128, which
//! multiplies the codes).
//!
//! Names and shapes are checked against the configuration before anything is allocated, so a hostile folder costs no
//! more memory than its files are long. Prediction modules whose tensors are absent are left out, with a warning.
//!
//! **Invariant**: a model that is loaded to be served as it is stored takes the memory of its files and of one matrix:
//! weights go from the file to the panels that products read, one expert at a time.

use std::path::Path;

use dsv3_ops::{Fp8, Fp8Format, Fp8Scales, Param, Precision, Tensor, Weight, fp8::Encoding, fp8::Tile};
use half::bf16;
use rayon::prelude::*;

use crate::decode;
use crate::model::encoded;
use crate::stored::{Entry, Folder, Stored};
use crate::weight_names::{ParamInfo, Role, Table};
use crate::{Error, HfConfig, Model, ModelConfig};

/// In what precision products with a loaded model are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadPrecision {
    /// As the weights are stored.
    #[default]
    Own,
    /// Another one.
    As(Precision),
}

/// A loaded model, and what was found lacking.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The model.
    pub model: Model,
    /// The folder's `config.json`.
    pub config: HfConfig,
    /// One sentence each, for a person.
    pub warnings: Vec<String>,
}

/// Loads the folder `path`. A trainable model gets FP32 masters (the values of the stored weights).
///
/// # Errors
/// When a file is missing or damaged, or a tensor does not fit `config.json`.
pub fn load(path: &Path, precision: LoadPrecision, trainable: bool) -> Result<Loaded, Error> {
    let (mut config, folder) = open(path)?;
    let mut warnings = Vec::new();
    let present = modules_present(&folder, &config.model);
    if present < config.model.num_nextn_predict_layers {
        warnings.push(format!(
            "{}: config.json names {} multi-token-prediction modules, the weights hold {present}; the others are left out",
            path.display(),
            config.model.num_nextn_predict_layers,
        ));
        config.model.num_nextn_predict_layers = present;
    }
    let table = Table::new(&config.model);
    for info in &table.params {
        check(&folder, info)?;
    }
    let own = match (own_precision(&folder, &table)?, &config.quantization) {
        (Precision::Fp8 { format, .. }, Some(quantization)) if quantization.scale_fmt.as_deref() == Some("ue8m0") => {
            let conform = scales_are_powers_of_two(&folder, &table)?;
            if !conform {
                let path = path.display();
                warnings
                    .push(format!("{path}: scale_fmt is ue8m0, but not every scale is a power of two; f32 is used"));
            }
            Precision::Fp8 { format, scales: if conform { Fp8Scales::Ue8m0 } else { Fp8Scales::F32 } }
        }
        (own, _) => own,
    };
    let target = match precision {
        LoadPrecision::Own => None,
        LoadPrecision::As(precision) => Some(precision),
    };
    let goal = Goal { target: target.or(trainable.then_some(own)), own, trainable };
    // What is served is read in order, so that only one parameter at a time exists in two forms.
    let params = match trainable {
        true => table.params.par_iter().map(|info| goal.read(&folder, info)).collect::<Result<Vec<_>, _>>()?,
        false => table.params.iter().map(|info| goal.read(&folder, info)).collect::<Result<Vec<_>, _>>()?,
    };
    let experts = config.model.n_routed_experts;
    let biases = table
        .biases
        .iter()
        .map(|bias| {
            let entry = folder.expect(&bias.name, &[experts])?;
            plain(&bias.name, entry)?;
            let mut values = Vec::with_capacity(experts);
            folder.append_f32(entry, &mut values)?;
            Ok(values)
        })
        .collect::<Result<Vec<_>, Error>>()?;
    let model = Model::assemble(config.model.clone(), table, params, biases, target.unwrap_or(own));
    Ok(Loaded { model, config, warnings })
}

/// Checks names, shapes and types of the folder's tensors against its `config.json` without reading a weight.
///
/// # Errors
/// At the first thing that [`load`] would refuse.
pub fn check_folder(path: &Path) -> Result<HfConfig, Error> {
    let (mut config, folder) = open(path)?;
    config.model.num_nextn_predict_layers = modules_present(&folder, &config.model);
    let table = Table::new(&config.model);
    for info in &table.params {
        check(&folder, info)?;
    }
    for bias in &table.biases {
        plain(&bias.name, folder.expect(&bias.name, &[config.model.n_routed_experts])?)?;
    }
    own_precision(&folder, &table)?;
    Ok(config)
}

fn open(path: &Path) -> Result<(HfConfig, Folder), Error> {
    let config_path = path.join("config.json");
    let text = std::fs::read(&config_path).map_err(|source| Error::Read { path: config_path, source })?;
    Ok((HfConfig::from_json(&text)?, Folder::open(path)?))
}

/// How many prediction modules the files hold, counted from the first.
fn modules_present(folder: &Folder, config: &ModelConfig) -> usize {
    let layers = config.num_hidden_layers;
    let absent = |module: &usize| !folder.has_prefix(&format!("model.layers.{}.", layers + module));
    (0..config.num_nextn_predict_layers).find(absent).unwrap_or(config.num_nextn_predict_layers)
}

/// Every tensor of `info` exists in the right shape, in one readable type.
fn check(folder: &Folder, info: &ParamInfo) -> Result<(), Error> {
    let mut first: Option<Stored> = None;
    for name in info.tensor_names() {
        let entry = folder.expect(&name, info.tensor_shape())?;
        match entry.stored {
            Stored::E4m3 if info.role == Role::Linear || info.role == Role::Projection => {
                let scales = scale_name(&name);
                plain(&scales, folder.expect(&scales, &scale_shape(info.tensor_shape()))?)?;
            }
            _ => plain(&name, entry)?,
        }
        if *first.get_or_insert(entry.stored) != entry.stored {
            let found = entry.type_name.clone();
            return Err(Error::Type { name, found, wanted: "the type of the layer's other experts" });
        }
    }
    Ok(())
}

fn plain(name: &str, entry: &Entry) -> Result<(), Error> {
    match entry.stored {
        Stored::F32 | Stored::Bf16 | Stored::F16 => Ok(()),
        Stored::E4m3 | Stored::Other => {
            let found = entry.type_name.clone();
            Err(Error::Type { name: name.to_owned(), found, wanted: "F32 or BF16 (FP8 in linear layers)" })
        }
    }
}

/// The one precision all linear layers are stored in; products that share an input need it to be one.
fn own_precision(folder: &Folder, table: &Table) -> Result<Precision, Error> {
    let mut linears = table.params.iter().filter(|info| info.role == Role::Linear).filter_map(|info| {
        let name = info.tensor_names().swap_remove(0);
        folder.find(&name).map(|entry| (name.clone(), entry))
    });
    let Some((_, first)) = linears.next() else { return Ok(Precision::F32) };
    match linears.find(|(_, entry)| entry.stored != first.stored) {
        Some((name, entry)) => {
            let found = entry.type_name.clone();
            Err(Error::Type { name, found, wanted: "the type of the other linear layers" })
        }
        None => Ok(match first.stored {
            Stored::Bf16 => Precision::Bf16,
            Stored::E4m3 => Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 },
            Stored::F32 | Stored::F16 | Stored::Other => Precision::F32,
        }),
    }
}

/// Whether every FP8 scale has a bare exponent. Such a weight encoded again with UE8M0 scales has the same values.
fn scales_are_powers_of_two(folder: &Folder, table: &Table) -> Result<bool, Error> {
    for info in table.params.iter().filter(|info| info.role == Role::Linear) {
        let mut scales = Vec::new();
        for name in info.tensor_names() {
            folder.append_f32(folder.expect(&scale_name(&name), &scale_shape(info.tensor_shape()))?, &mut scales)?;
        }
        if scales.iter().any(|scale| !scale.is_normal() || *scale < 0.0 || scale.to_bits() & 0x7f_ffff != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What to make of stored tensors.
#[derive(Clone, Copy)]
struct Goal {
    /// `None`: as stored.
    target: Option<Precision>,
    /// How the linear layers are stored.
    own: Precision,
    trainable: bool,
}

impl Goal {
    /// Reads one parameter whose tensors [`check`] has seen.
    fn read(&self, folder: &Folder, info: &ParamInfo) -> Result<Param, Error> {
        let entries: Vec<(String, &Entry)> = info
            .tensor_names()
            .into_iter()
            .map(|name| folder.expect(&name, info.tensor_shape()).map(|entry| (name, entry)))
            .collect::<Result<_, _>>()?;
        let stored = entries.first().map_or(Stored::F32, |(_, entry)| entry.stored);
        let served = |compute| Ok(Param { id: info.id, master: None, compute });
        if stored == Stored::E4m3 {
            let scales = read_scales(folder, info, &entries)?;
            let precision = self.target.unwrap_or(self.own);
            if !self.trainable && precision == (Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 }) {
                let read = |i: usize, codes: &mut [u8]| folder.read(entries[i].1, 0, codes);
                return served(if decode::is_prepacked(info) {
                    Weight::packed_fp8(&info.shape, scales, read)?
                } else {
                    Weight::from_fp8(read_codes(folder, info, &entries)?, scales)
                });
            }
            let (codes, encoding) = (read_codes(folder, info, &entries)?, Encoding::E4m3);
            let master = Fp8 { codes, scales, tile: Tile::Block128, encoding, offsets: [].into() }.dequantize();
            return Ok(self.encode(info, master, precision));
        }
        let is_f32 = matches!(info.role, Role::Norm | Role::Router);
        if stored == Stored::Bf16 && self.target.is_none() && !is_f32 {
            if decode::is_prepacked(info) {
                return served(Weight::packed_bf16(&info.shape, |i, out| folder.read_bf16(entries[i].1, out))?);
            }
            let mut values = vec![bf16::ZERO; info.numel()];
            let each = values.len() / entries.len().max(1);
            for ((_, entry), values) in entries.iter().zip(values.chunks_mut(each.max(1))) {
                folder.read_bf16(entry, values)?;
            }
            return served(Weight::from_plain(Tensor::bf16(&info.shape, values)));
        }
        let mut values = Vec::with_capacity(info.numel());
        entries.iter().try_for_each(|(_, entry)| folder.append_f32(entry, &mut values))?;
        let precision = self.target.unwrap_or(Precision::F32);
        Ok(self.encode(info, Tensor::f32(&info.shape, values), precision))
    }

    fn encode(&self, info: &ParamInfo, master: Tensor, precision: Precision) -> Param {
        let compute = encoded(info.role, &master, precision);
        if self.trainable {
            return Param { id: info.id, compute, master: Some(master) };
        }
        drop(master);
        Param { id: info.id, master: None, compute: decode::laid_out(info, &compute) }
    }
}

/// Codes of all tensors of a parameter.
fn read_codes(folder: &Folder, info: &ParamInfo, entries: &[(String, &Entry)]) -> Result<Tensor, Error> {
    let mut codes = vec![0; info.numel()];
    let each = codes.len() / entries.len().max(1);
    for ((_, entry), codes) in entries.iter().zip(codes.chunks_mut(each.max(1))) {
        folder.read(entry, 0, codes)?;
    }
    Ok(Tensor::u8(&info.shape, codes))
}

/// Their scales, which must be finite and not negative.
fn read_scales(folder: &Folder, info: &ParamInfo, entries: &[(String, &Entry)]) -> Result<Tensor, Error> {
    let mut scales = Vec::new();
    let wanted = scale_shape(info.tensor_shape());
    for (name, _) in entries {
        let (scale_name, first) = (scale_name(name), scales.len());
        folder.append_f32(folder.expect(&scale_name, &wanted)?, &mut scales)?;
        if let Some(block) = scales[first..].iter().position(|scale| !scale.is_finite() || *scale < 0.0) {
            let what = format!("{scale_name}: block {block} has the scale {}", scales[first + block]);
            return Err(Error::File { path: folder.path.clone(), what });
        }
    }
    let mut shape = wanted;
    if info.is_stacked() {
        shape.insert(0, info.shape[0]);
    }
    Ok(Tensor::f32(&shape, scales))
}

/// Name of the scales of the FP8 tensor `name`.
pub(crate) fn scale_name(name: &str) -> String {
    format!("{name}_scale_inv")
}

/// Shape of the scales of a matrix.
pub(crate) fn scale_shape(shape: &[usize]) -> Vec<usize> {
    shape.iter().map(|size| size.div_ceil(dsv3_ops::fp8::TILE)).collect()
}

#[cfg(test)]
mod tests;
