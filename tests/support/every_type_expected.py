"""What every type is expected to do where a group of heads of every attention is not cut out exactly."""

# By kind of outcome (see `cutting.KINDS`), with what lies behind it.
EXPECTED: dict[str, str] = {
    # the builder's config does not fit the model, or it needs inputs of its own: `probe=` is asked for
    "no inputs": """
        audioflamingo3_encoder autoformer bark blip_2_qformer bros clvp cohere_compass_vision convnext
        convnextv2 cosmos3_edge_vision dac decision_transformer diffusion_gemma efficientloftr encodec
        exaone4_5_vision fastspeech2_conformer_with_hifigan fun_asr_nano_encoder gemma3n_audio gemma4_audio
        gemma4_vision glm4v_moe glm4v_moe_text glm4v_moe_vision glm4v_vision glm5_next_vision glm_image_vision
        glm_image_vqmodel glm_ocr_vision glmasr_encoder granite_docling_vision granite_speech5_ctc
        granite_speech5_encoder hunyuan_vl_vision idefics informer inkling2_vision instructblip
        instructblipvideo kimi_k25_vision kosmos-2 layoutlmv3 levit lfm3_vl_vision lightglue lilt
        longcat_flash lw_detr lxmert mimi_encoder minicpm_ocr_vision minicpmv4_7_vision mobilevitv2 moonshine
        muse_glimmer_assistant muse_glimmer_vision muse_spark_vision nemotron3_5_transcribe_word_timestamp
        neucodec patchtsmixer patchtst pe_audio pe_audio_encoder pi0 pix2struct
        pocket_tts_audio_tokenizer_encoder pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_small_det
        pp_ocrv6_small_rec pp_ocrv6_tiny_rec pvt pvt_v2 qwen2_5_omni_thinker qwen2_5_vl_vision
        qwen3_5_moe_vision qwen3_5_vision qwen3_asr_encoder qwen3_omni_moe_thinker qwen3_vl_moe_vision
        qwen3_vl_vision qwen4_exp_vision rf_detr sam sam3 sam3_lite_text sam3_tracker sam3_tracker_video
        sam3_video sam_hq seamless_m4t seggpt siglip2 siglip2_vision_model time_series_transformer timesfm
        timesfm2_5 udop uvdoc video_llama_3_vision voxtral_realtime voxtral_realtime_encoder wav2vec2-bert
        xclip xcodec xcodec2 xmod
    """,
    # no softmax in front of a matrix product: state space, convolution, Fourier, einsum
    "no attention": """
        falcon_mamba fnet focalnet funnel hgnet_v2 ibert kimi_linear mamba mamba2 mobilenet_v1 mobilenet_v2
        mra poolformer recurrent_gemma regnet rwkv sam3_lite_text_text_model squeezebert swiftformer textnet
        xlnet xlstm yoso
    """,
    # masks or noise in evaluation mode
    "not deterministic": """
        univnet vilt vit_mae
    """,
    # a norm over all heads together, a bias made elsewhere, heads that are recombined
    "mixed heads": """
        big_bird bitnet bloom convbert deepseek_v4 diffllama esmc flex_olmo jetmoe minimax_m2
        nemotron3_5_transcribe_asr_audio nemotron3_diarization_audio olmo2 olmo3 olmo_hybrid olmoe prophetnet
        wavlm
    """,
    # the forward fixes the width, or numbers of heads that it takes from elsewhere
    "not with fewer heads": """
        blip blip-2 codegen doge fsmt groupvit led longformer mgp-str mpt timesformer
        trocr
    """,
    # tied attention
    "a parameter of two modules": """
        zamba2
    """,
    # a projection split by head
    "a parameter of one head": """
        zaya
    """,
    # some attentions can be cut and some cannot
    "partly": """
        aimv2 aimv2_vision_model aya_vision bigbird_pegasus cohere2_vision paligemma pegasus_x segformer siglip
        siglip_vision_model
    """,
    # the builder's config is refused, or the model is large for all that
    "not built": """
        align bit blt bridgetower chameleon clap cohere_compass cohere_compass_text csm d_fine dbrx
        deepseek_ocr2 deimv2 depth_pro dia dinov3_convnext donut-swin dots1 dots3_note edgetam_video
        efficientnet emu3 florence2 fun_asr_nano gemma3n_text gemma4_assistant gemma4_unified_assistant
        glm5_next glm5_next_text granite4_vision grounding-dino inkling2 janus kyutai_speech_to_text lfm2_moe
        llama4 luke mask2former maskformer maskformer-swin mimi mimi_decoder mm-grounding-dino molmo2
        moonshine_streaming muse_spark muse_spark_audio musicgen musicgen_melody nemo_speechlm
        nemotron3_5_transcribe_audio nemotron3_diarization nemotron_h_omni oneformer perceiver
        pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_decoder pp_doclayout_v3 pp_doclayout_v4
        pp_ocrv6_medium_det qwen3_5 qwen3_5_moe qwen4_exp qwen4_exp_text reformer resnet rt_detr rt_detr_v2
        sam2 sam2_hiera_det_model sam2_video sam2_vision_model swin swin2sr swinv2 t5gemma2_encoder tvp
        vibevoice vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder
        vibevoice_acoustic_tokenizer_encoder vibevoice_asr videoprism videoprism_vision_model vjepa2
        voxtral_realtime_text zamba
    """,
    # not installed where the tests run (timm and others); not checked
    "needs a package": """
        conditional_detr dab-detr deformable_detr detr dinat edgetam edgetam_vision_model fast_vlm gemma3n
        gemma3n_vision higgs_audio_v2_tokenizer layoutlmv2 omdet-turbo pe_audio_video pe_audio_video_encoder
        pe_video pe_video_encoder perception_lm table-transformer timm_backbone timm_wrapper
    """,
}
