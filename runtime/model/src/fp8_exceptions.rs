//! The report's exceptions to the FP8 recipe, as options of a model in training, and which parameters each concerns.
//!
//! All are off by default, and then every product has the bits it has without them. They are marks on the encoded weights
//! (`dsv3_ops::fp8::Exceptions`), so training, recomputation and the rollouts of a policy take the same products; a folder
//! does not store them. DeepSeek-V3 report §3.3.3; `reference/deepseek-v3.md` §5 and §14.

use dsv3_ops::fp8::Exceptions;

use crate::Model;
use crate::block::{Block, Feedforward};
use crate::mlp::Mlp;

/// Exceptions to the FP8 recipe (DeepSeek-V3 report, 3.3.3), each on its own; none by default. They need `precision: fp8`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(deny_unknown_fields, default)]
pub struct Fp8Exceptions {
    /// Inputs of the linear after the attention operator (`o_proj`) are quantised with power-of-two scales, in the forward
    /// product and, where they are cached in FP8, in the weight gradient.
    pub attention_output_power_of_two: bool,
    /// Inputs of the linear after the attention operator are cached for the backward pass in E5M6 (12 bits) with
    /// power-of-two scales; the weight gradient requantises them in 128×1 tiles with power-of-two scales. The forward
    /// product reads FP8 as before.
    pub attention_output_e5m6: bool,
    /// Activations before the MoE up-projections (dispatch to the routed experts) and the activation gradient before the
    /// MoE down-projections are quantised with power-of-two scales, in 1×128 and in 128×1 tiles.
    pub dispatch_power_of_two: bool,
    /// Inputs of SwiGLU are cached in FP8 (1×128 tiles) and its output is computed again in the backward pass, in dense
    /// MLPs, shared and routed experts; the down projection caches nothing.
    pub swiglu_inputs_fp8: bool,
}

impl Fp8Exceptions {
    /// All of them, as DeepSeek-V3 was trained.
    pub const REPORT: Self = Self {
        attention_output_power_of_two: true,
        attention_output_e5m6: true,
        dispatch_power_of_two: true,
        swiglu_inputs_fp8: true,
    };

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Every option by its name, and whether it is on.
    pub fn by_name(&self) -> [(&'static str, bool); 4] {
        [
            ("attention_output_power_of_two", self.attention_output_power_of_two),
            ("attention_output_e5m6", self.attention_output_e5m6),
            ("dispatch_power_of_two", self.dispatch_power_of_two),
            ("swiglu_inputs_fp8", self.swiglu_inputs_fp8),
        ]
    }

    /// The linear after attention.
    fn attention_output(&self) -> Exceptions {
        Exceptions {
            input_power_of_two: self.attention_output_power_of_two,
            input_e5m6: self.attention_output_e5m6,
            ..Exceptions::default()
        }
    }

    /// Gate and up projections of routed experts.
    fn dispatch(&self) -> Exceptions {
        Exceptions { input_power_of_two: self.dispatch_power_of_two, ..Exceptions::default() }
    }

    /// Down projections, of routed experts or others.
    fn down(&self, routed: bool) -> Exceptions {
        Exceptions {
            gradient_power_of_two: routed && self.dispatch_power_of_two,
            swiglu_recomputed: self.swiglu_inputs_fp8,
            ..Exceptions::default()
        }
    }
}

impl Model {
    /// Takes the products of every layer, prediction modules included, with these exceptions from now on. Changing masters
    /// or the precision keeps them; in another precision than FP8 they do nothing.
    pub fn set_fp8_exceptions(&mut self, exceptions: Fp8Exceptions) {
        let table = self.table.clone();
        let blocks = table.graph.blocks.iter().chain(table.graph.mtp.iter().map(|module| &module.block));
        let marks: Vec<_> = blocks.flat_map(|block| marks(block, exceptions)).collect();
        for (id, marks) in marks {
            let compute = &mut self.params_mut()[id as usize].compute;
            *compute = compute.clone().with_exceptions(marks);
        }
    }
}

/// The exceptions of the parameters of one layer that can have any.
fn marks(block: &Block, exceptions: Fp8Exceptions) -> Vec<(dsv3_ops::ParamId, Exceptions)> {
    let mut marks = vec![(block.attention.o, exceptions.attention_output())];
    let down = |mlp: &Mlp, routed| (mlp.down, exceptions.down(routed));
    match &block.feedforward {
        Feedforward::Dense(mlp) => marks.push(down(mlp, false)),
        Feedforward::Moe(moe) => {
            marks.extend([moe.experts.gate, moe.experts.up].map(|id| (id, exceptions.dispatch())));
            marks.push(down(&moe.experts, true));
            marks.extend(moe.shared.iter().map(|mlp| down(mlp, false)));
        }
    }
    marks
}
