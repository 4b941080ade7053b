"""What can be done with the types that have attention, where it is not everything; see `serving.CAPABILITIES`."""

# By what can be done, the types.
SERVED: dict[str, str] = {
    "swap window entropy contribution prune": """
        afmoe axk1 aya_vision bailing_hybrid cohere2_vision deepseek_v2 deepseek_v3 dinov3_vit dpt
        embedding_gemma2 embedding_gemma2_text fuyu glm4_moe_lite gpt_bigcode gpt_neox gte hrm_text
        inkling_mm_model inkling_text internvl internvl_vision jina_embeddings_v3 kimi_k25 markuplm minicpm3
        mistral4 mlcd mlcd_vision_model modernbert modernvbert moss_transcribe_diarize_audio neomme nomic_bert
        opt persimmon pixtral qianfan_ocr qianfan_ocr_vision qwen2_audio_encoder radio sam3_vision_model
        sam3_vit_model siglip siglip_vision_model speech_to_text step3p7 tipsv2 tipsv2_text_model
        tipsv2_vision_model umt5 voxtral_encoder yolos youtu
    """,
    "contribution prune": """
        aimv2 axk2 bigbird_pegasus canine cvt data2vec-vision deberta deberta-v2 deepseek_v32
        dots3_note_text falcon flaubert flava git glm_moe_dsa glpn gpt_neo gpt_neox_japanese gptj hiera
        hy_v4 imagegpt megatron-bert mistral_large4 mistral_large4_text mobilevit mvp nystromformer
        openai-gpt pegasus_x rembert roformer sam_hq_vision_model sam_vision_model sew-d speecht5 tapas
        visual_bert vitdet xglm xlm
    """,
    "contribution": """
        big_bird blip bloom codegen doge fsmt groupvit led longformer mgp-str mpt prophetnet
        timesformer trocr
    """,
    "swap window entropy contribution": """
        blip-2 cosmos3_edge cosmos3_edge_text diffllama esmc flex_olmo gradium_phonon_tts minimax_m2 olmo2
        olmo3 olmo_hybrid olmoe video_llava zamba2 zaya
    """,
    "swap window entropy contribution alike convert": """
        canary cohere_asr molmo2_text mt5 nemotron3_5_asr nemotron_asr_streaming
        nemotron_asr_streaming_encoder parakeet_ctc parakeet_encoder parakeet_rnnt parakeet_tdt phi3
        phi4_multimodal pop2piano t5
    """,
    "swap window contribution prune": """
        aimv2_vision_model got_ocr2 pp_chart2table pp_formulanet
    """,
    "entropy contribution prune": """
        inkling2_text nllb-moe paligemma splinter
    """,
    "swap window entropy contribution convert": """
        bitnet
    """,
    "contribution alike": """
        cpmant mpnet
    """,
    "swap window entropy": """
        deepseek_v4 jetmoe
    """,
    "swap entropy contribution": """
        nemotron3_5_transcribe_asr_audio nemotron3_diarization_audio
    """,
    "swap window contribution alike": """
        longt5
    """,
    "swap contribution prune": """
        segformer
    """,
    "swap window entropy contribution alike": """
        switch_transformers
    """,
    "contribution prune convert": """
        t5gemma2
    """,
    "": """
        convbert wavlm
    """,
}
