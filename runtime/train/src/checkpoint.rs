//! A trainer as files and back, bit for bit.
//!
//! `masters.safetensors`: FP32 masters and router biases by their published names (experts stacked).
//! `moments.safetensors`: `first.NAME` and `second.NAME`, BF16 or F32. State JSON:
//! `{format, updates, state: TrainerState}`; floats are written so that they read back to the same bits.
//! No clock, no rate, no host: equal runs write equal bytes.

use dsv3_model::Model;
use dsv3_ops::{DType, Tensor};
use half::bf16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    trainer::{Trainer, TrainerState},
};

/// File of the FP32 masters and router biases.
pub const MASTERS: &str = "masters.safetensors";
/// File of the optimiser's moments.
pub const MOMENTS: &str = "moments.safetensors";
/// Version written by this build.
const FORMAT: u32 = 1;

/// A trainer as bytes.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Steps done.
    pub step: u64,
    /// Name and content of each file.
    pub files: Vec<(String, Vec<u8>)>,
    /// Everything else.
    pub state: serde_json::Value,
}

impl Snapshot {
    /// Content of a file.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, dsv3_core::Error> {
        let file = self.files.iter().find(|(file, _)| file == name);
        file.map(|(_, bytes)| bytes.clone()).ok_or_else(|| dsv3_core::Error::data(format!("no file {name}")))
    }
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    format: u32,
    updates: u64,
    state: TrainerState,
}

impl Trainer {
    /// Everything a later step depends on.
    ///
    /// # Errors
    /// When the state cannot be written.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let infos = self.model.infos();
        let (first, second) = self.optimizer.moments();
        let masters = infos.iter().zip(self.model.params()).map(|(info, param)| {
            let master = param.master.as_ref().ok_or_else(|| Error::NotTrainable { name: info.name.clone() })?;
            Ok((info.name.clone(), Stored::of(master)))
        });
        let biases = self.model.bias_infos().iter().zip(self.model.biases()).map(|(info, bias)| {
            Ok((info.name.clone(), Stored { dtype: Dtype::F32, shape: vec![bias.len()], bytes: f32_bytes(bias) }))
        });
        let moments = infos.iter().zip(first.iter().zip(second)).flat_map(|(info, (m, v))| {
            [Ok((format!("first.{}", info.name), Stored::of(m))), Ok((format!("second.{}", info.name), Stored::of(v)))]
        });
        let files = vec![
            (MASTERS.to_owned(), serialize(MASTERS, masters.chain(biases).collect::<Result<_>>()?)?),
            (MOMENTS.to_owned(), serialize(MOMENTS, moments.collect::<Result<_>>()?)?),
        ];
        let state = StateFile { format: FORMAT, updates: self.optimizer.updates(), state: self.state.clone() };
        let state = serde_json::to_value(state).map_err(|source| Error::State { source })?;
        Ok(Snapshot { step: self.state.earlier_steps + self.state.step, files, state })
    }

    /// Puts a snapshot's content in place of this trainer's. `read` gives a file by name.
    ///
    /// # Errors
    /// When a file is missing, damaged, or of another model; the trainer is not to be used then.
    pub fn restore(
        &mut self,
        state: &serde_json::Value,
        mut read: impl FnMut(&str) -> Result<Vec<u8>, dsv3_core::Error>,
    ) -> Result<()> {
        let state = StateFile::deserialize(state).map_err(|source| Error::State { source })?;
        if state.format != FORMAT {
            let problem = format!("its state has format {}, this build reads {FORMAT}", state.format);
            return Err(Error::Checkpoint { file: "state".to_owned(), problem });
        }
        let mut file = |name: &str| read(name).map_err(|source| Error::Store { source });
        restore_masters(&mut self.model, &file(MASTERS)?)?;
        let moments = file(MOMENTS)?;
        let moments = Reader::new(MOMENTS, &moments)?;
        for (id, info) in self.model.infos().iter().enumerate() {
            let (m, v) = (&mut self.optimizer.first[id], &mut self.optimizer.second[id]);
            *m = moments.tensor(&format!("first.{}", info.name), m.dtype(), m.shape())?;
            *v = moments.tensor(&format!("second.{}", info.name), v.dtype(), v.shape())?;
        }
        self.optimizer.updates = state.updates;
        self.state = state.state;
        Ok(())
    }
}

fn restore_masters(model: &mut Model, bytes: &[u8]) -> Result<()> {
    let reader = Reader::new(MASTERS, bytes)?;
    for id in 0..model.infos().len() {
        let info = &model.infos()[id];
        let master = reader.tensor(&info.name, DType::F32, &info.shape)?;
        model.params_mut()[id].master = Some(master);
    }
    for index in 0..model.bias_infos().len() {
        let shape = [model.biases()[index].len()];
        let bias = reader.tensor(&model.bias_infos()[index].name, DType::F32, &shape)?;
        model.biases_mut()[index] = bias.into_f32();
    }
    model.encode();
    Ok(())
}

/// A tensor as safetensors stores it.
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn of(tensor: &Tensor) -> Self {
        let shape = tensor.shape().to_vec();
        match tensor.dtype() {
            DType::Bf16 => {
                let bytes = tensor.as_bf16().iter().flat_map(|x| x.to_le_bytes()).collect();
                Self { dtype: Dtype::BF16, shape, bytes }
            }
            _ => Self { dtype: Dtype::F32, shape, bytes: f32_bytes(tensor.as_f32()) },
        }
    }
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn damaged(file: &str, problem: impl ToString) -> Error {
    Error::Checkpoint { file: file.to_owned(), problem: problem.to_string() }
}

fn serialize(file: &str, tensors: Vec<(String, Stored)>) -> Result<Vec<u8>> {
    let views = tensors.iter().map(|(name, stored)| {
        let view = TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes);
        view.map(|view| (name.as_str(), view)).map_err(|error| damaged(file, error))
    });
    safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None).map_err(|error| damaged(file, error))
}

/// A file of tensors that must have given types and shapes.
struct Reader<'a> {
    file: &'static str,
    tensors: SafeTensors<'a>,
}

impl<'a> Reader<'a> {
    fn new(file: &'static str, bytes: &'a [u8]) -> Result<Self> {
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| damaged(file, error))?;
        Ok(Self { file, tensors })
    }

    fn tensor(&self, name: &str, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let view = self.tensors.tensor(name).map_err(|error| damaged(self.file, format!("{name}: {error}")))?;
        let wanted = if dtype == DType::Bf16 { Dtype::BF16 } else { Dtype::F32 };
        if view.dtype() != wanted || view.shape() != shape {
            let found = format!("{:?} {:?}", view.dtype(), view.shape());
            return Err(damaged(self.file, format!("{name} is {found}, the run needs {wanted:?} {shape:?}")));
        }
        let data = view.data();
        Ok(if dtype == DType::Bf16 {
            Tensor::bf16(shape, data.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b)).collect())
        } else {
            Tensor::f32(shape, data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        })
    }
}
