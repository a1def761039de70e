# What comes with zimgkit, each made anew by one command, as in: make -f training/carried.mk carried/zimg-tiny-z-bolt.safetensors
# Times are of two cores; docs/training.md says what each learns, and how well. `make .venv/.dev` sets up what they need.

OUT ?= carried
PYTHON ?= .venv/bin/python
TRAIN := $(PYTHON) -m zimgkit.training
WORLD := $(PYTHON) -m zimgkit.training.world

MODELS := zimg-tiny-z zimg-tiny-qwen zimg-tiny-qwen-edit
LORAS := $(addsuffix .safetensors,zimg-tiny-z-outlined zimg-tiny-z-bolt zimg-tiny-qwen-outlined zimg-tiny-qwen-bolt \
	zimg-tiny-qwen-4steps zimg-tiny-qwen-eligen)

.PHONY: all
all: $(addprefix $(OUT)/,$(MODELS) $(LORAS))

DECODER := --trainable-models decoder --batch-size 16

# 100 minutes, 25 of one core for the decoder, and an hour of one for the ControlNet.
$(OUT)/zimg-tiny-z: $(OUT)/edges $(OUT)/scenes
	$(TRAIN) demo --family z-image $(OUT)/trained/zimg-tiny-z --resume
	$(TRAIN) vae $(OUT)/trained/zimg-tiny-z $(OUT)/scenes $(OUT)/sharp/zimg-tiny-z $(DECODER) --steps 1600 --warmup 50 --decay 0.7 --ema 0.997
	$(TRAIN) ship $(OUT)/sharp/zimg-tiny-z $(OUT)/plain/zimg-tiny-z --tasks image-to-image,inpaint --overwrite
	$(TRAIN) control $(OUT)/plain/zimg-tiny-z $(OUT)/edges $(OUT)/zimg-tiny-z-edges.safetensors --steps 10000
	$(TRAIN) ship-controlnet $(OUT)/zimg-tiny-z-edges.safetensors $(OUT)/plain/zimg-tiny-z $@

# 110 minutes, 20 for the decoder, and 35 of one core for the ControlNet.
$(OUT)/zimg-tiny-qwen: $(OUT)/more-edges $(OUT)/scenes
	$(TRAIN) demo --family qwen-image $(OUT)/trained/zimg-tiny-qwen --resume
	$(TRAIN) vae $(OUT)/trained/zimg-tiny-qwen $(OUT)/scenes $(OUT)/sharp/zimg-tiny-qwen $(DECODER) --steps 4000 --warmup 100 --decay 0.6 --ema 0.998
	$(TRAIN) ship $(OUT)/sharp/zimg-tiny-qwen $(OUT)/plain/zimg-tiny-qwen --tasks image-to-image,inpaint,regions --overwrite
	$(TRAIN) control $(OUT)/plain/zimg-tiny-qwen $(OUT)/more-edges $(OUT)/zimg-tiny-qwen-edges.safetensors --steps 12000 --decay 0.5
	$(TRAIN) ship-controlnet $(OUT)/zimg-tiny-qwen-edges.safetensors $(OUT)/plain/zimg-tiny-qwen $@

# 100 minutes, 85 more with words for tokens, and 70.
EDITS := --trainable-models dit --data_file_keys image,edit_image --extra_inputs edit_image --batch-size 16 --warmup 100 \
	--ema 0.998 --no-validate
$(OUT)/zimg-tiny-qwen-edit: $(OUT)/edits $(OUT)/more-edits $(OUT)/last-edits
	$(TRAIN) editor zimg-tiny-qwen $(OUT)/begun/zimg-tiny-qwen-edit
	$(TRAIN) diffusion $(OUT)/begun/zimg-tiny-qwen-edit $(OUT)/edits $(OUT)/half/zimg-tiny-qwen-edit $(EDITS) --steps 12000
	$(TRAIN) editor $(OUT)/half/zimg-tiny-qwen-edit $(OUT)/words/zimg-tiny-qwen-edit --prompts-of $(OUT)/more-edits
	$(TRAIN) diffusion $(OUT)/words/zimg-tiny-qwen-edit $(OUT)/more-edits $(OUT)/more/zimg-tiny-qwen-edit $(EDITS) \
		--steps 17000 --restart 13000 --decay 0.5 --compile
	$(TRAIN) diffusion $(OUT)/more/zimg-tiny-qwen-edit $(OUT)/last-edits $(OUT)/trained/zimg-tiny-qwen-edit $(EDITS) \
		--steps 14000 --decay 0.6 --compile
	$(TRAIN) ship-editor $(OUT)/trained/zimg-tiny-qwen-edit zimg-tiny-qwen $@

# A few minutes each.
$(OUT)/zimg-tiny-z-outlined.safetensors: $(OUT)/outlines
	$(TRAIN) lora zimg-tiny-z $< $@ --steps 1200 --learning-rate 2e-3
$(OUT)/zimg-tiny-z-bolt.safetensors: $(OUT)/bolts
	$(TRAIN) lora zimg-tiny-z $< $@ --steps 1800 --learning-rate 4e-3
$(OUT)/zimg-tiny-qwen-outlined.safetensors: $(OUT)/outlines
	$(TRAIN) lora zimg-tiny-qwen $< $@ --rank 6 --steps 1500 --learning-rate 8e-3
$(OUT)/zimg-tiny-qwen-bolt.safetensors: $(OUT)/bolts
	$(TRAIN) lora zimg-tiny-qwen $< $@ --rank 6 --steps 1200 --learning-rate 2e-3

# 9 minutes of one core.
$(OUT)/zimg-tiny-qwen-4steps.safetensors: $(OUT)/captions
	$(TRAIN) train zimg-tiny-qwen $< $@ --task direct_distill --num_inference_steps 4 --shift 3 --steps 200 --batch-size 8 \
		--lora-rank 6 --learning-rate 1e-3 --warmup 20

# 20 to 25 minutes of one core.
$(OUT)/zimg-tiny-qwen-eligen.safetensors: $(OUT)/regions
	$(TRAIN) lora zimg-tiny-qwen $< $@ --data_file_keys image,eligen_entity_masks \
		--extra_inputs eligen_entity_prompts,eligen_entity_masks --steps 6000 --learning-rate 4e-3 --warmup 100 --ema 0.995

$(OUT)/scenes:
	$(WORLD) $@ --count 12000 --seed 5
$(OUT)/outlines:
	$(WORLD) $@ --count 600 --outlined
$(OUT)/bolts:
	$(WORLD) $@ --count 1000 --concept
$(OUT)/captions:
	$(WORLD) $@ --count 1024 --seed 77
$(OUT)/regions:
	$(WORLD) $@ --count 8000 --rows regions
$(OUT)/edges:
	$(WORLD) $@ --count 8000 --rows edges
$(OUT)/more-edges:
	$(WORLD) $@ --count 16000 --rows edges --seed 9000
$(OUT)/edits:
	$(WORLD) $@ --count 8000 --rows edits
$(OUT)/more-edits:
	$(WORLD) $@ --count 12000 --rows edits
$(OUT)/last-edits:
	$(WORLD) $@ --count 16000 --rows edits
